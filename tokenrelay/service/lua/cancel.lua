-- Cancel by id: end a waiting request here, tell the worker of a running one.
-- KEYS: waiting, leases
-- ARGV: prefix, id, expected next index, msgpack of {encoded event …} that end it there, retention in ms,
--       the API process whose last reader has gone; '' if it is cancelled whoever reads it
-- Returns 'waiting' | 'running' | 'finished' | 'unknown': what the request was; 'read' if another API process has a
-- reader of it, so that it goes on; or 'changed' if it is waiting at another index than expected: read its log, build
-- the ending anew, call again

local _, id, expected, events, retention_ms, gone = unpack(ARGV)
local request = fetch(id)
if not request then return 'unknown' end
if request.state == 'finished' then return 'finished' end

-- A process that died has no mailbox for long.
local function is_read_elsewhere()
  local others = ''
  for reader in string.gmatch(field(id, 'readers') or '', '%S+') do
    if reader ~= gone and redis.call('EXISTS', prefix .. 'mailbox:' .. reader) == 1 then
      others = others .. ' ' .. reader
    end
  end
  redis.call('HSET', request_key(id), 'readers', others)
  return others ~= ''
end

if gone ~= '' and is_read_elsewhere() then return 'read' end
if request.state == 'waiting' and request.next ~= tonumber(expected) then return 'changed' end
redis.call('HSET', request_key(id), 'cancelled', 1)
if request.state == 'running' then
  wake('cancel ' .. id)
else
  append(id, request, request.next, cmsgpack.unpack(events))
  deliver()
  conclude(id, retention_ms)
end
return request.state
