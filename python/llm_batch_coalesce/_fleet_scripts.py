"""What the server does in one step each: the scripts of flights that a fleet shares.

For every key there is at most one flight (a hash: its name, the token of who leads, and the inboxes of the processes
that wait) and one outcome (a string). Both have a lifetime, so nothing stays behind, whatever dies. The keys of one
flight share a hash tag, and so a slot of a cluster.

A flight is named by the token of its first leader; who takes it over has a token of its own. One that was forgotten
while under way has a key of its own, with its name: its waiters are served, and nobody joins it. An outcome that is not
retained is readable under the flight's name for one lease.
"""

# KEYS: flight, outcome, and of the flight that was waited for: [outcome under its name, forgotten flight].
# ARGV: token, lease in ms, inbox, name of the flight that was waited for or "", [damaged outcome].
# Returns {"outcome", payload, ms left, dropped}, {"lead", flight's name, 0, dropped} or {"wait", flight's name, ms left
# of the lease, dropped}; `dropped` is how many keys were of another type or had no lifetime, and so were none of ours.
# Who has the lead already has been given it by the same claim, and has not heard so: its connection was cut.
CLAIM = """
local dropped = 0
local function drop(key)
  redis.call('DEL', key)
  dropped = dropped + 1
end
local function read(command, key, ...)
  local value = redis.pcall(command, key, ...)
  if type(value) ~= 'table' or not value.err then
    return value
  end
  if string.find(value.err, 'WRONGTYPE', 1, true) then
    drop(key)
    return false
  end
  return redis.call(command, key, ...)
end
local function outcome(key)
  local value = read('GET', key)
  if value and value == ARGV[5] then
    redis.call('DEL', key)
    return false
  end
  return value
end
local function wait(flight, name)
  redis.call('HSET', flight, 'inbox:' .. ARGV[3], '1')
  local left = redis.call('PTTL', flight)
  if left < 0 then
    redis.call('PEXPIRE', flight, ARGV[2])
    left = tonumber(ARGV[2])
  end
  return {'wait', name, left, dropped}
end
local value = outcome(KEYS[2])
if value then
  local left = redis.call('PTTL', KEYS[2])
  if left >= 0 then
    return {'outcome', value, left, dropped}
  end
  drop(KEYS[2])
end
if ARGV[4] ~= '' then
  value = outcome(KEYS[3])
  if value then
    return {'outcome', value, 0, dropped}
  end
  if read('HGET', KEYS[4], 'token') then
    return wait(KEYS[4], ARGV[4])
  end
end
local fields = read('HMGET', KEYS[1], 'token', 'name') or {false, false}
local token, name = fields[1], fields[2]
if token == ARGV[1] then
  return {'lead', name, 0, dropped}
end
if token then
  return wait(KEYS[1], name or token)
end
if name then
  redis.call('HDEL', KEYS[1], 'inbox:' .. ARGV[3])
else
  name = ARGV[1]
end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'name', name)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'lead', name, 0, dropped}
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

# KEYS: flight, forgotten flight, outcome, outcome under the flight's name. ARGV: token, payload, TTL in ms, lease in
# ms, digest, flight's name, how many bytes a message may hold: a smaller payload comes with it.
# Returns 1 if the token still held the lease, 2 if its flight was forgotten, 0 if not.
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
return forgotten and 2 or 1
"""
)

# KEYS: flight, forgotten flight. ARGV: token, lease in ms, digest, inbox that no longer waits or "", name of the flight
# that it waited for or "" if that is not known. Gives up the lead, if the token has it, and the wait. If nobody leads
# then, one of those that wait may. A node of a cluster does not know who listens on others, so more than one may be
# told there; the first that claims leads.
RELEASE = (
    _HELD
    + """
local flight, forgotten = held()
if flight then
  redis.call('HDEL', flight, 'token')
else
  flight = KEYS[1]
end
if ARGV[4] ~= '' and (ARGV[5] == '' or redis.pcall('HGET', KEYS[1], 'name') == ARGV[5]) then
  redis.pcall('HDEL', KEYS[1], 'inbox:' .. ARGV[4])
end
local fields = redis.pcall('HMGET', flight, 'token', 'name')
if fields.err or fields[1] or not fields[2] then
  return
end
for _, inbox in ipairs(inboxes(flight)) do
  redis.call('HDEL', flight, 'inbox:' .. inbox)
  local heard = redis.call('PUBLISH', inbox, 'free ' .. ARGV[3] .. ' ' .. fields[2])
  if heard > 0 and not forgotten then
    redis.call('PEXPIRE', flight, ARGV[2])
    return
  end
end
redis.call('DEL', flight)
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

# KEYS: flight, outcome. ARGV: what the keys of forgotten flights begin with, the channel of all, digest. Returns
# whether there was something to forget: 0 or 1. A flight whose lead is free has made no call yet, so it may go on.
FORGET = """
local there = redis.call('DEL', KEYS[2])
local fields = redis.pcall('HMGET', KEYS[1], 'token', 'name')
if fields.err then
  redis.call('DEL', KEYS[1])
elseif fields[1] then
  redis.call('RENAME', KEYS[1], ARGV[1] .. (fields[2] or fields[1]))
  there = 1
end
redis.call('PUBLISH', ARGV[2], 'forget ' .. ARGV[3])
return there
"""

# KEYS: outcome. Returns it, or nil.
PEEK = """
local value = redis.pcall('GET', KEYS[1])
if type(value) == 'table' and string.find(value.err, 'WRONGTYPE', 1, true) then
  return false
end
return value
"""
