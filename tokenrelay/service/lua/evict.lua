-- A worker is known to be dead: its leases are over and it is announced no more. `reclaim` hands its requests on.
-- KEYS: leases, workers, the worker, its last claim
-- ARGV: prefix, worker

local leases, workers, worker, last_claim = unpack(KEYS)
for _, id in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
  if field(id, 'owner') == ARGV[2] then redis.call('ZADD', leases, 0, id) end
end
redis.call('DEL', worker, last_claim)
redis.call('ZREM', workers, ARGV[2])
