"""What the server does in one step each: the scripts of flights that a fleet shares.

For every key there is at most one flight (a hash: the token of who leads, and the inboxes of the processes that wait) and
one outcome (a string). Both have a lifetime, so nothing stays behind, whatever dies. The keys of one flight share a hash
tag, and so a slot of a cluster.

A flight that was forgotten while under way has a key of its own, with its token: its waiters are served, and nobody
joins it. An outcome that is not retained is readable under the flight's token for one lease.
"""

# KEYS: flight, outcome, [outcome of the flight that was waited for]. ARGV: token, lease in ms, inbox, [damaged outcome].
# Returns {"outcome", payload, ms left}, {"lead", flight's name} or {"wait", flight's name, ms left of the lease}. A flight
# is named by the token of its first leader; who takes it over has a token of its own.
CLAIM = """
local function get(key)
  local value = redis.pcall('GET', key)
  if type(value) == 'table' and value.err then
    redis.call('DEL', key)
    return false
  end
  if value and value == ARGV[4] then
    redis.call('DEL', key)
    return false
  end
  return value
end
for number = 2, #KEYS do
  local value = get(KEYS[number])
  if value then
    local left = redis.call('PTTL', KEYS[number])
    return {'outcome', value, number == 2 and left or 0}
  end
end
local fields = redis.pcall('HMGET', KEYS[1], 'token', 'name')
if fields.err then
  redis.call('DEL', KEYS[1])
  fields = {false, false}
end
local token, name = fields[1], fields[2]
if token then
  redis.call('HSET', KEYS[1], 'inbox:' .. ARGV[3], '1')
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    left = tonumber(ARGV[2])
  end
  return {'wait', name or token, left}
end
if name then
  redis.call('HDEL', KEYS[1], 'inbox:' .. ARGV[3])
else
  name = ARGV[1]
end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'name', name)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'lead', name}
"""

_HELD = """
local function held()
  for number = 1, 2 do
    if redis.pcall('HGET', KEYS[number], 'token') == ARGV[1] then
      return KEYS[number], number == 2
    end
  end
end
local function inboxes(flight)
  local names = {}
  for _, field in ipairs(redis.call('HKEYS', flight)) do
    if string.sub(field, 1, 6) == 'inbox:' then
      names[#names + 1] = string.sub(field, 7)
    end
  end
  return names
end
"""

# KEYS: flight, forgotten flight, outcome, outcome under the flight's name. ARGV: token, payload, TTL in ms, lease in ms,
# digest, flight's name, how many bytes a message may hold: a smaller payload comes with it. Returns whether the token still held the lease: 0 or 1.
COMPLETE = (
    _HELD
    + """
local flight, forgotten = held()
if not flight then
  return 0
end
local names = inboxes(flight)
redis.call('DEL', flight)
local place = 'name'
if tonumber(ARGV[3]) > 0 and not forgotten then
  redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
  place = 'key'
elseif #names > 0 then
  redis.call('SET', KEYS[4], ARGV[2], 'PX', ARGV[4])
end
local message = 'done ' .. ARGV[5] .. ' ' .. ARGV[6] .. ' ' .. place .. ' '
if #ARGV[2] <= tonumber(ARGV[7]) then
  message = message .. ARGV[2]
end
for _, name in ipairs(names) do
  redis.call('PUBLISH', name, message)
end
return 1
"""
)

# KEYS: flight, forgotten flight. ARGV: token, lease in ms, digest, flight's name. Lets one of those that wait lead.
RELEASE = (
    _HELD
    + """
local flight, forgotten = held()
if not flight then
  return 0
end
local names = inboxes(flight)
if forgotten or #names == 0 then
  redis.call('DEL', flight)
else
  redis.call('HDEL', flight, 'token', 'inbox:' .. names[1])
  redis.call('PEXPIRE', flight, ARGV[2])
end
for number, name in ipairs(names) do
  if number == 1 or forgotten then
    redis.call('PUBLISH', name, 'free ' .. ARGV[3] .. ' ' .. ARGV[4])
  end
end
return 1
"""
)

# KEYS: flight, forgotten flight. ARGV: token, lease in ms. Returns whether the token still holds the lease: 0 or 1.
RENEW = (
    _HELD
    + """
local flight = held()
if not flight then
  return 0
end
redis.call('PEXPIRE', flight, ARGV[2])
return 1
"""
)

# KEYS: flight, outcome. ARGV: what the keys of forgotten flights begin with, the channel of all, digest. Returns whether
# there was something to forget: 0 or 1.
FORGET = """
local there = redis.call('DEL', KEYS[2])
local token = redis.pcall('HGET', KEYS[1], 'token')
if type(token) == 'string' then
  redis.call('RENAME', KEYS[1], ARGV[1] .. token)
  there = 1
else
  redis.call('DEL', KEYS[1])
end
redis.call('PUBLISH', ARGV[2], 'forget ' .. ARGV[3])
return there
"""
