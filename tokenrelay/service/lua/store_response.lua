-- Keep what a response is made from. The oldest are forgotten: those past their time, and those there is no room for.
-- KEYS: response, responses, response_sizes
-- ARGV: prefix, id, tenant, input, lifetime in ms, most bytes of all responses together

local response, responses, sizes = unpack(KEYS)
local _, id, tenant, input, lifetime_ms, limit = unpack(ARGV)

redis.call('HSET', response, 'tenant', tenant, 'input', input)
redis.call('PEXPIRE', response, lifetime_ms)
weigh_response(id, #input + #tenant + #id)

local too_old = now_ms() - lifetime_ms
local oldest = redis.call('ZRANGE', responses, 0, EXPIRY_BATCH - 1, 'WITHSCORES')
for i = 1, #oldest, 2 do
  local full = tonumber(redis.call('HGET', sizes, 'all')) > tonumber(limit)
  if oldest[i] ~= id and (full or tonumber(oldest[i + 1]) <= too_old) then weigh_response(oldest[i], 0) end
end
