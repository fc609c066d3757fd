-- A reader joins: its mailbox gets the events from here on, the earlier ones are in the log.
-- KEYS: request
-- ARGV: prefix, id, mailbox
-- Returns {state, index of the last event}, or nil if there is no such request

local request = fetch(ARGV[2])
if not request then return nil end
local present = string.find(' ' .. request.mailboxes .. ' ', ' ' .. ARGV[3] .. ' ', 1, true)
if not present then redis.call('HSET', KEYS[1], 'mailboxes', request.mailboxes .. ' ' .. ARGV[3]) end
return {request.state, request.next - 1}
