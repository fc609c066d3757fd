-- Accept a request, once per request id and per idempotency key.
-- KEYS: request, waiting, leases, fair, idempotency key (the request again if the caller gave none)
-- ARGV: prefix, id, payload, mailbox, tenant, cost, priority, max waiting
-- Returns {'created' | 'existing' | 'full', position, id}
-- Start-time fair queueing: a tenant's request starts at its previous one's virtual finish, but not in the past.

local request, waiting, leases, fair, idempotency = unpack(KEYS)
local _, id, payload, mailbox, tenant, cost, priority, max_waiting = unpack(ARGV)
local keyed = idempotency ~= request
local CLASS = 2 ^ 44  -- room of one priority class in the score: 17 trillion tokens of virtual time

local function existing(known)
  local mine = field(known, 'payload') == payload  -- sent again after a lost reply
  return {mine and 'created' or 'existing', redis.call('ZRANK', waiting, known) or 0, known}
end

if redis.call('EXISTS', request) == 1 then return existing(id) end
local known = keyed and redis.call('GET', idempotency)
if known and redis.call('EXISTS', request_key(known)) == 1 then return existing(known) end

local num_waiting = redis.call('ZCARD', waiting)
if num_waiting >= tonumber(max_waiting) then return {'full', num_waiting, id} end
if num_waiting == 0 and redis.call('ZCARD', leases) == 0 then redis.call('DEL', fair) end  -- idle: clocks restart

local clock = tonumber(redis.call('ZSCORE', fair, 'clock') or 0)
local start = math.max(clock, tonumber(redis.call('ZSCORE', fair, 'tenant:' .. tenant) or 0))
local finish = start + tonumber(cost)
local class = math.max(-100, math.min(100, tonumber(priority)))
local score = integer(class * CLASS + finish)

local now = now_ms()
redis.call('HSET', request, 'payload', payload, 'state', 'waiting', 'owner', '', 'epoch', 0, 'attempts', 0, 'next', 1,
  'mailboxes', mailbox, 'score', score, 'start', integer(start), 'submitted_at', now, 'waiting_since', now,
  'idempotency', keyed and idempotency or '')
redis.call('EXPIRE', request, LIVE_TTL)
redis.call('ZADD', waiting, score, id)
redis.call('ZADD', fair, integer(finish), 'tenant:' .. tenant)
if keyed then redis.call('SET', idempotency, id, 'EX', LIVE_TTL) end
wake('submit')
return {'created', redis.call('ZRANK', waiting, id), id}
