-- How much waits, how fast it drains, and where some requests stand.
-- KEYS: waiting
-- ARGV: prefix, msgpack of {id …}
-- Returns {requests waiting, their tokens, their bytes, drain rate, {whereabouts of each id}}: {place} of one that waits,
-- {-1, prompt tokens computed, of these cached, ms since its claim} of one at work, else {}

local now = now_ms()

local function whereabouts(id)
  local place = redis.call('ZRANK', KEYS[1], id)
  if place then return {place} end
  local state, computed, cached, timeline =
    unpack(redis.call('HMGET', request_key(id), 'state', 'computed', 'cached', 'timeline'))
  if state ~= 'running' then return {} end
  local claimed_at = tonumber(string.match(timeline or '', '(%d+) claimed') or now)
  return {-1, tonumber(computed or 0), tonumber(cached or 0), now - claimed_at}
end

local found = {}
for i, id in ipairs(cmsgpack.unpack(ARGV[2])) do found[i] = whereabouts(id) end
local sums = redis.call('HMGET', prefix .. 'load', 'tokens', 'bytes')
return {redis.call('ZCARD', KEYS[1]), tonumber(sums[1] or 0), tonumber(sums[2] or 0), tostring(drain_rate()), found}
