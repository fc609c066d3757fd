-- A reader joins: its mailbox gets the events from here on, the earlier ones are in the log.
-- KEYS: request
-- ARGV: prefix, id, mailbox
-- Returns {state, index of the last event, ms until the deadline or -1}, or nil if there is no such request

local _, id, mailbox = unpack(ARGV)
local request = fetch(id)
if not request then return nil end

local function join(set)
  local names = field(id, set) or ''
  local present = string.find(' ' .. names .. ' ', ' ' .. mailbox .. ' ', 1, true)
  if not present then redis.call('HSET', KEYS[1], set, names .. ' ' .. mailbox) end
end

join('mailboxes')
join('readers')
local deadline = tonumber(field(id, 'deadline') or 0)
return {request.state, request.next - 1, deadline > 0 and math.max(0, deadline - now_ms()) or -1}
