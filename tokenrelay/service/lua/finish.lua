-- The last events of a request, its terminal one included, and the end of its lease: all or nothing.
-- KEYS: leases, dead
-- ARGV: prefix, worker, msgpack of {id, epoch, index, {encoded event …}, tokens}, retention in ms,
--       reason if it becomes a dead letter, else '', msgpack of the usage `settle` wants to know, or nil
-- Returns 1, or 0 if refused

local id, epoch, index, events, num_tokens = unpack(cmsgpack.unpack(ARGV[3]))
local request = fetch(id)
if not (owns(request, ARGV[2], epoch) and append(id, request, index, events, num_tokens)) then return 0 end
if request.state == 'finished' then return 1 end  -- repeated after a lost reply
if ARGV[5] ~= '' then bury(id, request, ARGV[5]) end
deliver()
conclude(id, ARGV[4], cmsgpack.unpack(ARGV[6]))
return 1
