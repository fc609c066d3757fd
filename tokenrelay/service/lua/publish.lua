-- Append the events of one engine step to the logs of its requests, and one entry to each reader's mailbox.
-- KEYS: leases (routes the call; the keys of the requests follow from their ids)
-- ARGV: prefix, worker, msgpack of {{id, epoch, index of the first event, {encoded event …}, tokens} …}
-- Returns the ids refused: no longer this worker's, or an index that would leave a gap

local refused = {}
for _, publication in ipairs(cmsgpack.unpack(ARGV[3])) do
  local id, epoch, index, events, num_tokens = unpack(publication)
  local request = fetch(id)
  if not (owns(request, ARGV[2], epoch) and append(id, request, index, events, num_tokens)) then
    refused[#refused + 1] = id
  elseif request.attempts > 1 then
    redis.call('HSET', request_key(id), 'attempts', 1)  -- it got further: not what killed its earlier workers
  end
end
deliver()
return refused
