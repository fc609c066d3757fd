-- Lease the first waiting requests to a worker. A call repeated with the same token finds what the first one leased.
-- KEYS: waiting, leases, fair, the worker's last claim
-- ARGV: prefix, worker, limit, lease in ms, token, max attempts, 1 if all that the worker holds has made progress
-- Returns {{id, epoch, attempts, payload, waited ms, cancelled, log entries} …}

local waiting, leases, fair, last_claim = unpack(KEYS)
local _, worker, limit, lease_ms, token, max_attempts, unsuspected = unpack(ARGV)
limit, lease_ms = tonumber(limit), tonumber(lease_ms)
local now = now_ms()

local function describe(id, request)
  return {id, request.epoch, tonumber(field(id, 'attempts')), field(id, 'payload'), now - field(id, 'waiting_since'),
    tonumber(field(id, 'cancelled') or 0), redis.call('XRANGE', log_key(id), '-', '+')}
end

local function repeated()
  local previous = redis.call('GET', last_claim)
  if not previous then return nil end
  local claim = cmsgpack.unpack(previous)
  if claim[1] ~= token then return nil end
  local claimed = {}
  for _, pair in ipairs(claim[2]) do
    local request = fetch(pair[1])
    if owns(request, worker, pair[2]) and request.state == 'running' then
      claimed[#claimed + 1] = describe(pair[1], request)
    end
  end
  return claimed
end

local function lease(id, request)
  request.epoch = request.epoch + 1
  redis.call('HSET', request_key(id), 'state', 'running', 'owner', worker, 'epoch', request.epoch)
  redis.call('HINCRBY', request_key(id), 'attempts', 1)
  redis.call('EXPIRE', request_key(id), LIVE_TTL)
  redis.call('EXPIRE', log_key(id), LIVE_TTL)
  redis.call('ZADD', leases, now + lease_ms, id)
  redis.call('HDEL', request_key(id), 'computed', 'cached', 'preemptions', 'paused')  -- what the last worker had done
  note(id, 'claimed ' .. worker .. ' ' .. integer(request.epoch))
end

-- The virtual clock is the start of what is being served; tenants behind it have no debt, so need no entry.
local function advance_clock(id)
  local start = tonumber(field(id, 'start'))
  if start > tonumber(redis.call('ZSCORE', fair, 'clock') or 0) then
    redis.call('ZADD', fair, integer(start), 'clock')
    redis.call('ZREMRANGEBYSCORE', fair, '-inf', '(' .. integer(start))
  end
end

local again = repeated()
if again then return again end

-- Who dies of a request takes others along. So the last attempt of one that met death before is made beside none that
-- could be at fault instead: whichever of them makes progress is cleared.
local function on_its_last_attempt(request)
  return request.attempts > 0 and request.attempts + 1 >= tonumber(max_attempts)
end

local claimed, pairs_claimed = {}, {}
local place = 0  -- in the queue; what only a newer version can read stays there for one, and `expire` ends the late
while #claimed < limit do
  local id = redis.call('ZRANGE', waiting, place, place)[1]
  if not id then break end
  local request = fetch(id)
  local last_attempt = request and on_its_last_attempt(request)
  if not request then
    leave(id)
  elseif tonumber(field(id, 'version') or 1) > NEWEST or tonumber(field(id, 'deadline') or math.huge) <= now then
    place = place + 1
  elseif last_attempt and (#claimed > 0 or unsuspected ~= '1') then
    break
  else
    leave(id)
    lease(id, request)
    advance_clock(id)
    claimed[#claimed + 1] = describe(id, request)
    pairs_claimed[#pairs_claimed + 1] = {id, request.epoch}
    if last_attempt then break end
  end
end
if #claimed > 0 then redis.call('SET', last_claim, cmsgpack.pack({token, pairs_claimed}), 'PX', lease_ms) end
return claimed
