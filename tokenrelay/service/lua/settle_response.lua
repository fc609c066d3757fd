-- A response has ended: keep it as it is now, so that its log need not be kept longer than any other's.
-- KEYS: response
-- ARGV: prefix, id, the response as JSON, lifetime in ms, retention of logs in ms
-- Returns 1, or 0 if it is not stored (any more)

local _, id, output, lifetime_ms, retention_ms = unpack(ARGV)
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'output', output)
redis.call('PEXPIRE', KEYS[1], lifetime_ms)
weigh_response(id, redis.call('HSTRLEN', KEYS[1], 'input') + #output + redis.call('HSTRLEN', KEYS[1], 'tenant') + #id)
if field(id, 'state') == 'finished' then
  redis.call('PEXPIRE', request_key(id), retention_ms)
  redis.call('PEXPIRE', log_key(id), retention_ms)
end
return 1
