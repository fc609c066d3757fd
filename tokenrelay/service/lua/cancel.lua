-- Cancel by id: end a waiting request here, tell the worker of a running one.
-- KEYS: waiting, leases
-- ARGV: prefix, id, expected next index, msgpack of {encoded event …} that end it there, retention in ms
-- Returns 'waiting' | 'running' | 'finished' | 'unknown': what the request was; or 'changed' if it is waiting at
-- another index than expected: read its log, build the ending anew, call again

local _, id, expected, events, retention_ms = unpack(ARGV)
local request = fetch(id)
if not request then return 'unknown' end
if request.state == 'running' then
  redis.call('HSET', request_key(id), 'cancelled', 1)
  wake('cancel ' .. id)
elseif request.state == 'waiting' then
  if request.next ~= tonumber(expected) then return 'changed' end
  append(id, request, request.next, cmsgpack.unpack(events))
  deliver()
  conclude(id, retention_ms)
end
return request.state
