-- A worker's facts, for a short while; workers that fell silent leave the list.
-- KEYS: worker, workers
-- ARGV: prefix, worker id, encoded facts, lifetime in ms

local now = now_ms()
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[4]), ARGV[2])
