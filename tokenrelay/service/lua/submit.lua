-- Accept a request, once per request id and per idempotency key.
-- KEYS: request, waiting, leases, fair, idempotency key (the request again if the caller gave none)
-- ARGV: prefix, id, payload, mailbox, tenant, msgpack of {cost, cost over the tenant's weight, tokens of the prompt, its
--       version},
--       priority, msgpack of the queue's limits,
--       msgpack of {how to answer, timeout in ms or 0, fingerprint of the body, retention in ms or 0 for the usual,
--       the tenant's limits}
-- Returns {'created', position, id, what is left of the tenant's limits} or {'existing', position, id}; {'mismatch'} if
-- the key stands for another body; what `refusal` returns; {'limited', why, ms until it would do, what is left}
-- Start-time fair queueing: a tenant's request starts at its previous one's virtual finish, but not in the past.

local request, waiting, leases, fair, idempotency = unpack(KEYS)
local _, id, payload, mailbox, tenant, size, priority, limits, terms = unpack(ARGV)
local cost, turn, num_prompt_tokens, version = unpack(cmsgpack.unpack(size))
local answer, timeout_ms, fingerprint, retention_ms, tenant_limits = unpack(cmsgpack.unpack(terms))
local keyed = idempotency ~= request
local CLASS = 2 ^ 44  -- room of one priority class in the score: 17 trillion tokens of virtual time

local function existing(known)
  local mine = field(known, 'payload') == payload  -- sent again after a lost reply
  return {mine and 'created' or 'existing', redis.call('ZRANK', waiting, known) or 0, known}
end

if redis.call('EXISTS', request) == 1 then return existing(id) end
local known = keyed and redis.call('GET', idempotency)
if known and redis.call('EXISTS', request_key(known)) == 1 and not field(known, 'cancelled') then
  if field(known, 'fingerprint') ~= fingerprint then return {'mismatch', 0, known} end
  return existing(known)
end

local bytes = #payload + #answer
local refused = refusal(tenant, cost, bytes, cmsgpack.unpack(limits), cost / turn)
if refused then return refused end
if redis.call('EXISTS', waiting, leases) == 0 then redis.call('DEL', fair) end  -- idle: clocks restart

local clock = tonumber(redis.call('ZSCORE', fair, 'clock') or 0)
local start = math.max(clock, tonumber(redis.call('ZSCORE', fair, 'tenant:' .. tenant) or 0))
local finish = start + turn
local class = math.max(-100, math.min(100, tonumber(priority)))
local score = integer(class * CLASS + finish)

-- A request that could not start before its deadline would only take the place of one that can. What is ahead of it is
-- estimated as if all that waits were of one size.
local function too_late()
  local num_waiting, rate = redis.call('ZCARD', waiting), drain_rate()
  if timeout_ms == 0 or num_waiting == 0 or redis.call('HEXISTS', prefix .. 'drain', 'tokens') == 0 then return nil end
  local tokens = redis.call('HGET', prefix .. 'load', 'tokens') / num_waiting
  local ahead = tokens * redis.call('ZCOUNT', waiting, '-inf', score)
  if 1000 * ahead <= rate * timeout_ms then return nil end
  return {'refused', 'deadline', num_waiting, integer(ahead), tostring(rate)}
end

refused = too_late()
if refused then return refused end

-- Last of all: what is refused anyway is not charged.
local limited, left = admit(id, tenant, cost, tenant_limits)
if limited then return limited end

local now = now_ms()
redis.call('HSET', request, 'payload', payload, 'state', 'waiting', 'owner', '', 'epoch', 0, 'attempts', 0, 'next', 1,
  'mailboxes', mailbox, 'score', score, 'start', integer(start), 'submitted_at', now, 'waiting_since', now,
  'tenant', tenant, 'cost', cost, 'prompt_tokens', num_prompt_tokens,
  'idempotency', keyed and idempotency or '', 'version', version,
  'answer', answer, 'fingerprint', fingerprint, 'readers', mailbox)
note(id, 'queued')
if retention_ms > 0 then redis.call('HSET', request, 'retention', retention_ms) end
if timeout_ms > 0 then
  redis.call('HSET', request, 'deadline', now + timeout_ms)
  redis.call('ZADD', prefix .. 'deadlines', now + timeout_ms, id)
end
if tenant_limits[2] > 0 then redis.call('HSET', request, 'tokens_per_minute', tenant_limits[2]) end
redis.call('EXPIRE', request, LIVE_TTL)
enter(id, score, tenant, cost, bytes)
redis.call('ZADD', fair, integer(finish), 'tenant:' .. tenant)
if keyed then redis.call('SET', idempotency, id, 'EX', LIVE_TTL) end
wake('submit')
return {'created', redis.call('ZRANK', waiting, id), id, left}
