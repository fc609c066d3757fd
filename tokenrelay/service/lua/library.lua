-- Stands before every script. ARGV[1] is always the key prefix of the model: keys of a request are derived from
-- its id here, and share the hash tag of KEYS.

local prefix = ARGV[1]
local deliveries = {}  -- mailbox -> encoded deliveries of this script

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
  local value = redis.call('HMGET', request_key(id), 'state', 'owner', 'epoch', 'next', 'mailboxes')
  if not value[1] then return nil end
  return {state = value[1], owner = value[2], epoch = tonumber(value[3]), next = tonumber(value[4]),
    mailboxes = value[5]}
end

-- What only the rarer scripts want to know of it.
local function field(id, name) return redis.call('HGET', request_key(id), name) end

-- The fence: a worker that was given up may not touch its request again. A waiting request has no owner.
local function owns(request, worker, epoch)
  return request and request.owner == worker and request.epoch == epoch
end

-- Append events from `index` to the log. What the log already has is a repetition after a lost reply: skipped.
-- False if that would leave a gap or follow the terminal event.
local function append(id, request, index, events)
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
  redis.call('HSET', request_key(id), 'next', last + 1)
  if first == 1 then redis.call('EXPIRE', log_key(id), LIVE_TTL) end
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

-- Back to the queue at its old place; the log stays.
local function requeue(id, attempts)
  redis.call('HSET', request_key(id), 'state', 'waiting', 'owner', '', 'attempts', attempts, 'waiting_since', now_ms())
  redis.call('ZREM', prefix .. 'leases', id)
  redis.call('ZADD', prefix .. 'waiting', field(id, 'score'), id)
end

-- The request is over: no lease, no prompt, and only the retention to live.
local function conclude(id, retention_ms)
  redis.call('HSET', request_key(id), 'state', 'finished')
  redis.call('HDEL', request_key(id), 'payload')
  redis.call('ZREM', prefix .. 'leases', id)
  redis.call('ZREM', prefix .. 'waiting', id)
  redis.call('PEXPIRE', request_key(id), retention_ms)
  redis.call('PEXPIRE', log_key(id), retention_ms)
  local idempotency = field(id, 'idempotency')
  if idempotency and idempotency ~= '' then redis.call('PEXPIRE', idempotency, retention_ms) end
end

local function bury(id, request, reason)
  redis.call('XADD', prefix .. 'dead', 'MAXLEN', DEAD_ENTRIES, '*', 'id', id, 'reason', reason,
    'owner', request.owner, 'attempts', field(id, 'attempts'), 'payload', field(id, 'payload') or '')
end
