-- Extend a worker's leases and the lifetime of what they lease.
-- KEYS: leases
-- ARGV: prefix, worker, lease in ms, msgpack of {{id, epoch} …}
-- Returns {{ids lost}, {ids whose client cancelled}}

local lost, cancelled = {}, {}
local expiry = now_ms() + tonumber(ARGV[3])
for _, held in ipairs(cmsgpack.unpack(ARGV[4])) do
  local id, epoch = unpack(held)
  local request = fetch(id)
  if not owns(request, ARGV[2], epoch) then
    lost[#lost + 1] = id
  elseif request.state == 'running' then
    redis.call('ZADD', KEYS[1], expiry, id)
    redis.call('EXPIRE', request_key(id), LIVE_TTL)
    redis.call('EXPIRE', log_key(id), LIVE_TTL)
    if field(id, 'cancelled') then cancelled[#cancelled + 1] = id end
  end
end
return {lost, cancelled}
