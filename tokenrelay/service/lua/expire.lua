-- End what is past its deadline: in the queue, before it cost anything, and at work.
-- KEYS: waiting, leases
-- ARGV: prefix, id, the event that ends it, retention in ms
-- Returns the ms until the deadline of this id; -1 if it has none (any more)

expire_due(ARGV[3], ARGV[4])
deliver()
local deadline = redis.call('ZSCORE', prefix .. 'deadlines', ARGV[2])
return deadline and math.max(0, deadline - now_ms()) or -1
