-- Create an API process's mailbox if it is gone, and let it live on.
-- KEYS: mailbox
-- ARGV: prefix, TTL in seconds
-- Returns {number of its newest entry, 1 if it was gone}

local gone = 1 - redis.call('EXISTS', KEYS[1])
if gone == 1 then redis.call('XADD', KEYS[1], '0-*', 'd', '\144') end  -- an empty array
redis.call('EXPIRE', KEYS[1], ARGV[2])
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1]
return {tonumber(string.match(newest, '-(%d+)')), gone}
