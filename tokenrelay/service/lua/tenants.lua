-- Stands behind library.lua in every script: what a tenant may do in a minute and at a time, and what it has used.
-- A limit per minute is a bucket of that size which refills steadily. Of a bucket is kept when it will be full (the
-- generic cell rate algorithm); one of which nothing is kept is full.

local MINUTE = 60000
local BUCKETS = {'requests', 'tokens'}

local function buckets_key(tenant) return prefix .. 'limits:' .. tenant end
local function live_key(tenant) return prefix .. 'live:' .. tenant end

-- ms until each bucket is full.
local function read_buckets(tenant, now)
  local until_full = {}
  for i, at in ipairs(redis.call('HMGET', buckets_key(tenant), unpack(BUCKETS))) do
    until_full[i] = math.max(0, tonumber(at or 0) - now)
  end
  return until_full
end

local function write_buckets(tenant, until_full, now)
  for i, ms in ipairs(until_full) do
    if ms > 0 then redis.call('HSET', buckets_key(tenant), BUCKETS[i], string.format('%.3f', now + ms)) end
  end
  local longest = math.ceil(math.max(unpack(until_full)))
  if longest > 0 then redis.call('PEXPIRE', buckets_key(tenant), longest) end
end

-- What is left in each bucket, and the ms until it is full.
local function told(until_full, limits)
  local reply = {}
  for i, ms in ipairs(until_full) do
    reply[#reply + 1] = math.max(0, math.floor(limits[i] * (1 - ms / MINUTE)))
    reply[#reply + 1] = math.ceil(ms)
  end
  return reply
end

-- The tenant's requests that have not ended. They are counted by name, so that none can be forgotten: one that is gone
-- without an end is missed here as soon as it would matter.
local function num_live(tenant, limit)
  local key = live_key(tenant)
  if redis.call('ZCARD', key) >= limit then
    for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      if (field(id, 'state') or 'finished') == 'finished' then redis.call('ZREM', key, id) end
    end
  end
  return redis.call('ZCARD', key)
end

-- Charge a request to its tenant's limits: requests per minute, tokens per minute, requests at a time; 0 is none.
-- Returns {'limited', why, ms until it would do, what is left}, or nil and what is left.
admit = function(id, tenant, tokens, limits)
  local now, amounts, limit_live = now_ms(), {1, tokens}, limits[3]
  local before, after = read_buckets(tenant, now), {}
  if limit_live > 0 and num_live(tenant, limit_live) >= limit_live then
    return {'limited', 'concurrent', 1000, told(before, limits)}
  end
  local wait, reason = 0, nil
  for i, name in ipairs(BUCKETS) do
    after[i] = limits[i] > 0 and before[i] + amounts[i] * MINUTE / limits[i] or 0
    if after[i] - MINUTE > wait then wait, reason = after[i] - MINUTE, name end
  end
  if wait >= 1 then return {'limited', reason, math.ceil(wait), told(before, limits)} end
  write_buckets(tenant, after, now)
  if limit_live > 0 then
    redis.call('ZADD', live_key(tenant), now, id)
    redis.call('EXPIRE', live_key(tenant), LIVE_TTL)
  end
  return nil, told(after, limits)
end

-- A request had been charged what it might take; it gets back what it did not.
local function give_back(tenant, tokens, limit)
  local now = now_ms()
  local at = redis.call('HGET', buckets_key(tenant), 'tokens')
  if not at then return end
  at = at - tokens * MINUTE / limit
  if at > now then
    redis.call('HSET', buckets_key(tenant), 'tokens', string.format('%.3f', at))
  else
    redis.call('HDEL', buckets_key(tenant), 'tokens')
  end
end

local function count_usage(tenant, prompt, completion, cached)
  local day = prefix .. 'usage:' .. integer(math.floor(now_ms() / 86400000))
  local counts = {requests = 1, prompt_tokens = prompt, completion_tokens = completion, cached_tokens = cached}
  for _, key in ipairs({prefix .. 'usage', day}) do
    for what, count in pairs(counts) do
      if count > 0 then redis.call('HINCRBY', key, tenant .. ':' .. what, integer(count)) end
    end
  end
  redis.call('EXPIRE', day, USAGE_TTL)
end

-- The request has ended: settle its account. `usage` is {prompt tokens, completion tokens, cached tokens}, or nil if
-- nobody told: then it is its prompt and what its log has; or nothing, if nobody ever worked on it.
settle = function(id, usage)
  local names = {'tenant', 'cost', 'tokens_per_minute', 'prompt_tokens', 'emitted', 'epoch'}
  local tenant, cost, limit, prompt, emitted, epoch = unpack(redis.call('HMGET', request_key(id), unpack(names)))
  if not tenant then return end
  local known = epoch == '0' and {0, 0, 0} or {tonumber(prompt or 0), tonumber(emitted or 0), 0}
  local used = usage or known
  redis.call('ZREM', live_key(tenant), id)
  if limit then give_back(tenant, math.max(0, cost - used[1] - used[2]), limit) end
  count_usage(tenant, unpack(used))
end
