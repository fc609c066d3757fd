-- How far a worker is with its prompts, and which requests it had to preempt.
-- KEYS: leases
-- ARGV: prefix, worker,
--       msgpack of {{id, epoch, prompt tokens computed, preemptions, 1 if computed now, else 0, tokens cached} …}

for _, report in ipairs(cmsgpack.unpack(ARGV[3])) do
  local id, epoch, num_computed, num_preemptions, runs, num_cached = unpack(report)
  local request = fetch(id)
  if owns(request, ARGV[2], epoch) and request.state == 'running' then
    local preempted = num_preemptions > tonumber(field(id, 'preemptions') or 0)
    if preempted then note(id, 'preempted') end
    if runs == 1 and (preempted or field(id, 'paused') == '1') then note(id, 'resumed') end
    redis.call('HSET', request_key(id), 'computed', num_computed, 'cached', num_cached, 'preemptions', num_preemptions,
      'paused', num_preemptions > 0 and 1 - runs or 0)
  end
end
