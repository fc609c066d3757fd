-- Hand on the requests of workers that fell silent: back to the queue, or to the dead after too many attempts.
-- KEYS: leases, waiting, dead
-- ARGV: prefix, batch, max attempts, encoded terminal event of a dead letter, retention in ms
-- Returns {leases looked at, {ids handed on}}; call again while a whole batch was looked at

local _, batch, max_attempts, event, retention_ms = unpack(ARGV)
local expired = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms(), 'LIMIT', 0, batch)
local reclaimed = {}
for _, id in ipairs(expired) do
  local request = fetch(id)
  if not request or request.state ~= 'running' then
    redis.call('ZREM', KEYS[1], id)
  else
    reclaimed[#reclaimed + 1] = id
    if request.attempts < tonumber(max_attempts) then
      requeue(id, request.attempts)
    else
      bury(id, request, 'worker_lost')
      append(id, request, request.next, {event})
      redis.call('HSET', request_key(id), 'owner', '')
      conclude(id, retention_ms)
    end
  end
end
deliver()
if #reclaimed > 0 then wake('submit') end
return {#expired, reclaimed}
