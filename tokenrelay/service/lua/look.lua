-- Whether any request of a tenant would be refused now, however small.
-- KEYS: waiting
-- ARGV: prefix, tenant, msgpack of the limits, the tenant's weight
-- Returns what `refusal` returns

return refusal(ARGV[2], 1, 1, cmsgpack.unpack(ARGV[3]), tonumber(ARGV[4]))
