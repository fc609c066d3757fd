-- Delete a stored response, and the log that it can be made from again: at once, or as soon as it is complete.
-- KEYS: response
-- ARGV: prefix, id

local id = ARGV[2]
weigh_response(id, 0)
if field(id, 'state') == 'finished' then
  redis.call('DEL', request_key(id), log_key(id))
elseif redis.call('EXISTS', request_key(id)) == 1 then
  redis.call('HSET', request_key(id), 'retention', 1)
end
