-- Stands before every script. ARGV[1] is always the key prefix of the model: keys of a request are derived from
-- its id here, and share the hash tag of KEYS.

local prefix = ARGV[1]
local deliveries = {}  -- mailbox -> encoded deliveries of this script
local admit, settle  -- in tenants.lua

local function request_key(id) return prefix .. 'request:' .. id end
local function log_key(id) return prefix .. 'log:' .. id end
local function wake(message) redis.call('PUBLISH', prefix .. 'wakeup', message) end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Scores stay integers below 2^53; Lua's own conversion would round them to 14 digits.
local function integer(number) return string.format('%.0f', number) end

-- The request, or nil if it is gone (expired, or the broker lost it).
local function fetch(id)
  local names = {'state', 'owner', 'epoch', 'next', 'mailboxes', 'attempts', 'emitted'}
  local value = redis.call('HMGET', request_key(id), unpack(names))
  if not value[1] then return nil end
  return {state = value[1], owner = value[2], epoch = tonumber(value[3]), next = tonumber(value[4]),
    mailboxes = value[5], attempts = tonumber(value[6]), emitted = tonumber(value[7] or 0)}
end

-- What only the rarer scripts want to know of it.
local function field(id, name) return redis.call('HGET', request_key(id), name) end

-- One more line of the request's timeline, newest first: "<ms> <what happened> <details>\n". Its time never goes back.
local function note(id, what)
  local timeline = field(id, 'timeline') or ''
  if #timeline > TIMELINE_BYTES and what ~= 'finished' then return end
  local at = math.max(now_ms(), tonumber(string.match(timeline, '^%d+') or 0))
  redis.call('HSET', request_key(id), 'timeline', integer(at) .. ' ' .. what .. '\n' .. timeline)
end

-- The fence: a worker that was given up may not touch its request again. A waiting request has no owner.
local function owns(request, worker, epoch)
  return request and request.owner == worker and request.epoch == epoch
end

-- Append events from `index` to the log, with `num_tokens` altogether. What the log already has is a repetition after a
-- lost reply: skipped. False if that would leave a gap or follow the terminal event.
local function append(id, request, index, events, num_tokens)
  local first, last = request.next, index + #events - 1
  if index > first or (last >= first and request.state == 'finished') then return false end
  if last < first then return true end
  local head = '\147' .. cmsgpack.pack(id)  -- a Delivery: array of id, index, event
  for i = first, last do
    local event = events[i - index + 1]
    redis.call('XADD', log_key(id), i .. '-0', 'e', event)
    local delivery = head .. cmsgpack.pack(i) .. event
    for mailbox in string.gmatch(request.mailboxes, '%S+') do
      local parts = deliveries[mailbox] or {}
      parts[#parts + 1] = delivery
      deliveries[mailbox] = parts
    end
  end
  redis.call('HSET', request_key(id), 'next', last + 1, 'emitted', request.emitted + (num_tokens or 0))
  if first == 1 then
    redis.call('EXPIRE', log_key(id), LIVE_TTL)
    local beginning = string.sub(events[first - index + 1], 1, 32)  -- the ids are an event's first or second field
    if string.find(beginning, 'token_ids', 1, true) then note(id, 'first_token') end
  end
  return true
end

-- One entry per mailbox: an array of deliveries. Ids count 0-1, 0-2 …, so that a reader sees what it missed;
-- a mailbox that does not exist has no reader.
local function deliver()
  for mailbox, parts in pairs(deliveries) do
    local header = '\220' .. string.char(math.floor(#parts / 256), #parts % 256)
    redis.call('XADD', prefix .. 'mailbox:' .. mailbox, 'NOMKSTREAM', 'MAXLEN', '~', MAILBOX_ENTRIES, '0-*',
      'd', header .. table.concat(parts))
  end
end

-- Sums over what waits, altogether and per tenant; one that is 0 has no field.
local function add_load(tenant, requests, tokens, bytes)
  local changes = {tokens = tokens, bytes = bytes, ['requests:' .. tenant] = requests, ['tokens:' .. tenant] = tokens}
  for sum, change in pairs(changes) do
    if redis.call('HINCRBY', prefix .. 'load', sum, integer(change)) == 0 then
      redis.call('HDEL', prefix .. 'load', sum)
    end
  end
end

-- The request is in the queue no more. Its size is known here, even if the request itself is gone.
local function leave(id)
  redis.call('ZREM', prefix .. 'waiting', id)
  local size = redis.call('HGET', prefix .. 'sizes', id)
  if not size then return end
  local tenant, tokens, bytes = unpack(cmsgpack.unpack(size))
  redis.call('HDEL', prefix .. 'sizes', id)
  add_load(tenant, -1, -tokens, -bytes)
  if redis.call('EXISTS', prefix .. 'waiting') == 0 then redis.call('HDEL', prefix .. 'drain', 'since') end
end

-- The only way into the queue; `leave` is the only way out.
local function enter(id, score, tenant, tokens, bytes)
  leave(id)  -- an older request of the same id, of which the queue's entry outlived the rest
  redis.call('ZADD', prefix .. 'waiting', score, id)
  redis.call('HSET', prefix .. 'sizes', id, cmsgpack.pack({tenant, tokens, bytes}))
  add_load(tenant, 1, tokens, bytes)
  redis.call('HSETNX', prefix .. 'drain', 'since', now_ms())
end

-- Back to the queue at its old place; the log stays.
local function requeue(id, attempts)
  redis.call('HSET', request_key(id), 'state', 'waiting', 'owner', '', 'attempts', attempts, 'waiting_since', now_ms())
  note(id, 'requeued')
  redis.call('ZREM', prefix .. 'leases', id)
  local bytes = redis.call('HSTRLEN', request_key(id), 'payload') + redis.call('HSTRLEN', request_key(id), 'answer')
  enter(id, field(id, 'score'), field(id, 'tenant') or '', tonumber(field(id, 'cost') or 0), bytes)
end

-- Work ended while requests wait: that is how fast the queue drains. An exponentially weighted mean, over the time
-- in which anything waited, of the tokens such requests had been counted as.
local function note_drained(tokens)
  local drained, busy, since = unpack(redis.call('HMGET', prefix .. 'drain', 'tokens', 'busy', 'since'))
  if not since then return end
  local now = now_ms()
  local kept = math.exp((since - now) / DRAIN_WINDOW_MS)
  redis.call('HSET', prefix .. 'drain', 'since', now, 'tokens', (drained or 0) * kept + tokens,
    'busy', (busy or 0) * kept + DRAIN_WINDOW_MS * (1 - kept))
end

-- Tokens per second. Before any work ended, as if all that runs ended now; or, if nothing runs either, as if all that
-- waits were worked on within as long as it has waited.
local function drain_rate()
  local drained, busy, since = unpack(redis.call('HMGET', prefix .. 'drain', 'tokens', 'busy', 'since'))
  local idle = since and math.max(0, now_ms() - since) or 0
  if drained then
    local kept = math.exp(-idle / DRAIN_WINDOW_MS)
    return 1000 * drained * kept / math.max(1, busy * kept + DRAIN_WINDOW_MS * (1 - kept))
  end
  local num_waiting = redis.call('ZCARD', prefix .. 'waiting')
  local num_running = redis.call('ZCARD', prefix .. 'leases')
  if num_waiting == 0 then return 0 end
  local tokens = tonumber(redis.call('HGET', prefix .. 'load', 'tokens') or 0)
  if num_running > 0 then tokens = tokens * num_running / num_waiting end
  return 1000 * tokens / math.max(1, idle)
end

-- Why a request of this size may not wait too: {'refused', limit, requests waiting, tokens to wait for, drain rate}, or
-- nil if it may. Limits: requests, tokens, bytes, a tenant's requests, a tenant's tokens; 0 is none. Nothing is too
-- large for an empty queue. `weight` is the tenant's; the others' is taken for 1.
local function refusal(tenant, tokens, bytes, limits, weight)
  local load, num_waiting = prefix .. 'load', redis.call('ZCARD', prefix .. 'waiting')
  local sums = redis.call('HMGET', load, 'tokens', 'bytes', 'requests:' .. tenant, 'tokens:' .. tenant)
  for i = 1, 4 do sums[i] = tonumber(sums[i] or 0) end
  local all_tokens, all_bytes, own_requests, own_tokens = unpack(sums)
  -- While a tenant's tokens drain, fair queueing lets every other tenant of its weight drain as many, if it has them.
  local num_others = (redis.call('HLEN', load) - 2) / 2 - 1
  local behind_tenant = math.min(all_tokens, own_tokens * (1 + num_others / weight))
  for _, check in ipairs({
    {'tenant_requests', own_requests, 1, limits[4], behind_tenant},
    {'tenant_tokens', own_tokens, tokens, limits[5], behind_tenant},
    {'requests', num_waiting, 1, limits[1], all_tokens},
    {'tokens', all_tokens, tokens, limits[2], all_tokens},
    {'bytes', all_bytes, bytes, limits[3], all_tokens},
  }) do
    local name, sum, more, limit, ahead = unpack(check)
    if limit > 0 and sum > 0 and sum + more > limit then
      return {'refused', name, num_waiting, integer(ahead), tostring(drain_rate())}
    end
  end
end

-- The request is over: no lease, no prompt, and only the retention to live, its own or the usual. `usage` is what `settle`
-- wants to know.
local function conclude(id, retention_ms, usage)
  settle(id, usage)
  retention_ms = field(id, 'retention') or retention_ms
  redis.call('HSET', request_key(id), 'state', 'finished')
  redis.call('HDEL', request_key(id), 'payload')
  if redis.call('ZREM', prefix .. 'leases', id) == 1 then note_drained(tonumber(field(id, 'cost') or 0)) end
  leave(id)
  redis.call('PEXPIRE', request_key(id), retention_ms)
  redis.call('PEXPIRE', log_key(id), retention_ms)
  redis.call('ZREM', prefix .. 'deadlines', id)
  note(id, 'finished')
  local idempotency = field(id, 'idempotency') or ''
  if idempotency ~= '' and redis.call('GET', idempotency) == id then
    if field(id, 'cancelled') then
      redis.call('DEL', idempotency)  -- given up, so no result: the key begins anew
    else
      redis.call('PEXPIRE', idempotency, retention_ms)
    end
  end
end

-- End what is past its deadline, waiting or running. Nobody owns it then; its worker is told to drop it.
local function expire_due(event, retention_ms)
  local now = now_ms()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'deadlines', '-inf', now, 'LIMIT', 0, EXPIRY_BATCH)) do
    local request = fetch(id)
    local late = request and tonumber(field(id, 'deadline') or math.huge) <= now
    if late and append(id, request, request.next, {event}) then
      redis.call('HSET', request_key(id), 'owner', '', 'cancelled', 1)
      conclude(id, retention_ms)
      if request.state == 'running' then wake('drop ' .. id) end
    end
    redis.call('ZREM', prefix .. 'deadlines', id)
  end
end

-- Its prompt goes with it, so neither the entry nor the stream may live for ever.
local function bury(id, request, reason)
  local dead = prefix .. 'dead'
  redis.call('XADD', dead, 'MAXLEN', DEAD_ENTRIES, '*', 'id', id, 'reason', reason, 'owner', request.owner,
    'attempts', request.attempts, 'num_events', request.next - 1, 'payload', field(id, 'payload') or '',
    'answer', field(id, 'answer') or '')
  redis.call('XTRIM', dead, 'MINID', integer(now_ms() - DEAD_TTL * 1000))
  redis.call('EXPIRE', dead, DEAD_TTL)
end

-- What a stored response takes in memory; 0: it is forgotten.
local function weigh_response(id, bytes)
  local sizes = prefix .. 'response_sizes'
  redis.call('HINCRBY', sizes, 'all', integer(bytes - tonumber(redis.call('HGET', sizes, id) or 0)))
  if bytes > 0 then
    redis.call('HSET', sizes, id, bytes)
    redis.call('ZADD', prefix .. 'responses', now_ms(), id)
  else
    redis.call('HDEL', sizes, id)
    redis.call('ZREM', prefix .. 'responses', id)
    redis.call('DEL', prefix .. 'response:' .. id)
  end
end
