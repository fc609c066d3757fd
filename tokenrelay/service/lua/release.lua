-- Hand one request back at drain. It was not the request's fault, so the attempt does not count.
-- KEYS: leases, waiting
-- ARGV: prefix, worker, id, epoch
-- Returns 1, or 0 if the request is not this worker's (any more)

local _, worker, id, epoch = unpack(ARGV)
local request = fetch(id)
if not owns(request, worker, tonumber(epoch)) or request.state ~= 'running' then return 0 end
requeue(id, request.attempts - 1)
wake('submit')
return 1
