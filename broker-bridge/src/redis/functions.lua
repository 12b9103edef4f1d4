#!lua name=tidegate

-- Reliable publishing for Tidegate: each call appends a message to the log of its room, and publishes it.
--
--   FCALL tidegate_publish 1 <log> <payload> [option value]...            -> { cursor, 0 }
--   FCALL tidegate_publish 2 <log> <id key> <payload> [option value]...   -> { cursor, 1 if published before, else 0 }
--   FCALL tidegate_open    1 <log> [size n] [ttl ms|none]                 -> cursor of the newest message
--   FCALL tidegate_clear   1 <log>                                        -> cursor of the newest message
--   FCALL tidegate_version 0                                              -> version of this library
--   FCALL tidegate_begin   0 <writer>                                     -> 0
--   FCALL tidegate_verify  1 <log> <writer> <number>                      -> { last, reach, number, cursor, ... }
--
-- Needs Redis 7.0 or later. Calls are atomic: an error means that nothing was written and nothing was published.
--
-- KEYS
--   <log>      <prefix>{room:<room>}:log        a stream. The channel is <prefix>room:<room>. The braces are a hash
--                                               tag: all keys of a room, and its channel, are in one Cluster slot.
--   <id key>   <prefix>{room:<room>}:id:<id>    a string, the cursor of the message with this id, for 120 seconds.
--                                               <id>: 1 to 128 bytes. Backends: b:<their id>, to keep clear of the
--                                               ids of clients.
--   Every key that a call touches is declared. Prefix: at most 64 bytes. Room: 1 to 200 bytes. Neither contains
--   white space, control characters or braces.
--
-- OPTIONS of tidegate_publish, in any order
--   event n       the name of the event: 1 to 64 bytes of UTF-8 without control characters, not reserved
--   kind k        json, text or binary. Default: text if the payload is UTF-8, else binary
--   size n        how many messages the log keeps at least: 1 to 4294967295. Default 1000
--   ttl ms        how long the log outlives its newest message, in milliseconds, up to 100 years; or `none`.
--                 Default 600000 (10 minutes)
--   w text        names the writer and its command, kept in the entry: 1 to 64 printable ASCII characters. Nodes write
--                 <writer>-<number>, see VERIFYING
--   envelope 1    the payload is what nodes read on the channel: raw bytes, or an envelope of version 1. It is passed
--                 on as it is
--   The log remembers size and ttl: a later call without them keeps the last ones.
--
-- VERIFYING
--   A node that loses a connection before an answer asks what became of its calls. It names each connection as a writer
--   (letters and digits), says so with `tidegate_begin` before the first call on it, and counts the calls in the option
--   w, in the order in which it sends them. Once Redis has closed the old connection, `tidegate_verify` answers for one
--   log:
--     last              the highest number of this writer that was published, in any log; 0 if none was, -1 if the
--                       library does not know the writer, because it was loaded later
--     reach             1 if the log has a lower number of this writer than the one asked for, so nothing that was
--                       recorded after it has been removed; 2 if the log has all of its messages, from the first on; else 0
--     number, cursor    what the log has of this writer, from the number asked for on; the newest first
--   Redis executes the calls of a connection in order. So a number above `last` was not published. The log is read only
--   as far as is needed, and at most 2,000 messages of it.
--
-- CURSOR
--   <epoch>-<offset>, and the ID of the entry in the stream. The offset counts the messages of the room, from 1; 0
--   means that there is none yet. The epoch is milliseconds since 2020, then 7 digits that depend on the writer: the
--   server in its present reign, by its replication ID, which changes with each restart and promotion. A restart from
--   an old snapshot, or a promotion of a replica that missed the end, would otherwise assign the same cursors again, to
--   other messages. When the writer changes, the library begins a new epoch and goes on counting (a fence). When a
--   log was deleted, it begins a new epoch at offset 1. Epochs of a room ascend, also when the clock is set back. Only
--   a log that is deleted after the clock was set back and the library was loaded again may get an earlier one.
--   An empty cursor means that the message was published but not kept: the key holds something that is no log (another
--   type, or IDs at the end of their range).
--
-- ENTRY: fields
--   d   the message as on the channel, without its header
--   p   a link, in the first entry after a fence: `u <cursor>` or `m <cursor>`, the newest message before. u: unproven,
--       the old writer may have accepted more messages after it. m: the log was moved from another master that still
--       reigns, and nothing was lost
--   w   the option w
--
-- CHANNEL
--   F5 'T' 'h' <cursor> [space <link>] LF <message>
--
-- GROUP
--   The log remembers its writer, size and ttl in the name of a consumer group: `tidegate writer=... size=... ttl=...`.
--   Unlike an entry, a group is not trimmed; and it is copied, saved and migrated with its stream. Nothing reads by it.

local VERSION = 2

local DEFAULT_SIZE = 1000
local DEFAULT_TTL_MS = 600000
local ID_TTL_MS = 120000
local MAX_SIZE = 4294967295
local MAX_TTL_MS = 3155760000000
local NEVER = 'none'

local YEAR_2020_MS = 1577836800000
-- A stream's IDs have 64 bits on each side.
local MAX_EPOCH_MS = 1844674407369
-- Lua writes integers of up to 14 digits in full.
local MAX_OFFSET = 99999999999999

-- How long the writer is believed to be the same. A server cannot be demoted and promoted again in less.
local REIGN_MS = 50
-- Rooms whose newest cursor is known without a look: between this and twice as many.
local KNOWN_ROOMS = 25000
-- Writers whose last number is known: between this and twice as many.
local KNOWN_WRITERS = 5000
-- How many entries are read at a time to find those of a writer, and how many at most.
local VERIFY_BATCH, VERIFY_MOST = 8, 2000

-- The writer and the last 7 digits of its epochs; when they were last looked at.
local writer, tag, looked_at
-- Names this state of the library on servers that hide their replication ID and their run ID.
local unproven
-- The newest time at which an epoch began, and the earliest that may begin now. Both in milliseconds since 2020.
local newest, floor = 0, 1

-- Rooms by key, in two generations: the older one is dropped when the younger one is full.
--   epoch, offset  the newest cursor       topic  the room's channel
--   size, ttl      the policy              group  the name of the consumer group
--   due            when the key's expiry has to be renewed next, in ms; nil: never
local young, old, count = {}, {}, 0

local function remember(key, room)
  if not young[key] then
    count = count + 1
    if count > KNOWN_ROOMS then
      old, young, count = young, {}, 1
      -- A forgotten log that is deleted and written again must not get an epoch that it had before.
      floor = newest + 1
    end
  end
  young[key] = room
end

local function recall(key)
  local room = young[key]
  if not room then
    room = old[key]
    if room then remember(key, room) end
  end
  return room
end

-- The last number of each writer, in two generations.
local young_writers, old_writers, writer_count = {}, {}, 0

local function note_number(name, number)
  if not young_writers[name] then
    writer_count = writer_count + 1
    if writer_count > KNOWN_WRITERS then old_writers, young_writers, writer_count = young_writers, {}, 1 end
  end
  young_writers[name] = number
end

local function last_number(name)
  return young_writers[name] or old_writers[name]
end

local function forget(key)
  young[key], old[key] = nil, nil
end

-- ## Arguments

-- Text of a caller for an error message.
local function shown(text)
  return "'" .. string.gsub(string.sub(text, 1, 64), '[^ -~]', '?') .. "'"
end

local function is_utf8(text)
  if not string.find(text, '[\128-\255]') then return true end
  -- Replace what is well-formed. Bytes that remain are not.
  for _, sequence in ipairs({
    '[\194-\223][\128-\191]',
    '\224[\160-\191][\128-\191]',
    '[\225-\236\238\239][\128-\191][\128-\191]',
    '\237[\128-\159][\128-\191]',
    '\240[\144-\191][\128-\191][\128-\191]',
    '[\241-\243][\128-\191][\128-\191][\128-\191]',
    '\244[\128-\143][\128-\191][\128-\191]',
  }) do
    text = string.gsub(text, sequence, '?')
  end
  return not string.find(text, '[\128-\255]')
end

-- White space of Unicode besides ASCII's, and the byte order mark. Some clients trim them around the name of an event.
local SPACES = {
  '%s', '\194\160', '\225\154\128', '\226\128[\128-\138]', '\226\128[\168\169]', '\226\128\175', '\226\129\159',
  '\227\128\128', '\239\187\191',
}

local function trimmed(text)
  local before
  repeat
    before = text
    for _, space in ipairs(SPACES) do
      text = string.gsub(string.gsub(text, '^' .. space, ''), space .. '$', '')
    end
  until text == before
  return text
end

-- An integer of decimal digits within these bounds.
local function integer(text, least, most)
  local number = string.match(text, '^%d+$') and tonumber(text)
  return number and number >= least and number <= most and number or nil
end

-- What nodes write in the option w.
local WRITTEN = '^(%w+)%-(%d+)$'

local JSON, TEXT, BINARY = '\0', '\1', '\2'
local KINDS = { json = JSON, text = TEXT, binary = BINARY }

-- Each option: what a value means, or nil if it is not one; and what is expected.
local OPTIONS = {
  event = { function(text)
    local bare = trimmed(text)
    local malformed = #text < 1 or #text > 64 or string.find(text, '%c') or string.find(text, '\194[\128-\159]') or not is_utf8(text)
    local reserved = bare == 'error' or bare == 'open' or string.lower(string.sub(bare, 1, 9)) == 'tidegate.'
    return not malformed and not reserved and text or nil
  end, '1 to 64 bytes of UTF-8 without control characters, and not error, open or tidegate.*' },
  kind = { function(text) return KINDS[text] end, 'json, text or binary' },
  size = { function(text) return integer(text, 1, MAX_SIZE) end, '1 to 4294967295' },
  ttl = { function(text) return text == NEVER and NEVER or integer(text, 1, MAX_TTL_MS) end,
    'none, or 1 to 3155760000000 milliseconds' },
  w = { function(text) return #text <= 64 and string.match(text, '^[!-~]+$') or nil end, '1 to 64 printable ASCII characters' },
  envelope = { function(text) return text == '1' or nil end, '1' },
}
local PUBLISH_OPTIONS = { event = true, kind = true, size = true, ttl = true, w = true, envelope = true }
local OPEN_OPTIONS = { size = true, ttl = true }
local CLEAR_OPTIONS = {}

-- The options among `args` from the `first` on; or nil and an error.
local function options_of(args, first, known)
  local options = {}
  for i = first, #args, 2 do
    local name, value = args[i], args[i + 1]
    if not known[name] then
      local names = {}
      for option in pairs(known) do names[#names + 1] = option end
      table.sort(names)
      local expected = #names > 0 and 'the options are ' .. table.concat(names, ', ') or 'there are no options'
      return nil, 'BADOPTION unknown option ' .. shown(name) .. ': ' .. expected
    end
    if not value then return nil, 'BADOPTION ' .. name .. ': the value is missing' end
    if options[name] ~= nil then return nil, 'BADOPTION ' .. name .. ': given twice' end
    local parse, expected = OPTIONS[name][1], OPTIONS[name][2]
    options[name] = parse(value)
    if options[name] == nil then
      return nil, 'BADOPTION ' .. name .. ': expected ' .. expected .. ', got ' .. shown(value)
    end
  end
  return options
end

-- The channel of the room with the log at `key`; or nil and an error.
local function topic_of(key)
  local prefix, topic = string.match(key, '^([^{}%s%c]*){(room:[^{}%s%c]+)}:log$')
  if not prefix or #prefix > 64 or #topic > 205 then
    return nil, 'BADKEY expected the key <prefix>{room:<room>}:log, got ' .. shown(key)
  end
  return prefix .. topic
end

-- Whether `id_key` is the key of an id in the room with the log at `key`.
local function is_id_key(id_key, key)
  local start = string.sub(key, 1, -5) .. ':id:'
  return string.sub(id_key, 1, #start) == start and #id_key > #start and #id_key <= #start + 128
end

-- The message as nodes read it: the bare payload where that says the same, else an envelope of version 1. Or nil and an
-- error.
local function message_of(payload, options)
  local kind, event = options.kind, options.event
  if options.envelope then
    if kind or event then return nil, 'BADOPTION envelope: excludes event and kind, which the envelope contains' end
    return payload
  end
  -- No text begins like this, but envelopes do.
  local ambiguous = string.sub(payload, 1, 1) == '\245'
  if not kind then
    if not event and not ambiguous then return payload end
    kind = is_utf8(payload) and TEXT or BINARY
  elseif kind ~= BINARY and not is_utf8(payload) then
    return nil, 'BADOPTION kind: the payload is not UTF-8, so its kind must be binary'
  end
  if not event and (kind == TEXT or kind == BINARY and not ambiguous and not is_utf8(payload)) then return payload end
  local fields = '\1\1' .. kind
  if event then fields = fields .. '\2' .. string.char(#event) .. event end
  return '\245Tg\1' .. struct.pack('>I2', #fields) .. fields .. struct.pack('>I4', #payload) .. payload
end

-- ## Permissions

local function forbid(...)
  local command = string.gsub(table.concat({ ... }, ' '), '[* d]*$', '')
  error({ err = 'NOPERM the user has no permissions for ' .. shown(command) })
end

-- Refuses the call if its user may not execute a command. Comes before the first write: Redis checks each command only
-- when it is executed, and does not undo those before.
local function permit(...)
  if not redis.acl_check_cmd(...) then forbid(...) end
end

local function permit_expiry(key, ttl)
  if ttl == NEVER then permit('PERSIST', key) else permit('PEXPIRE', key, '1') end
end

local function permit_group(key)
  if not redis.acl_check_cmd('XGROUP', 'CREATE', key, 'g', '$') then forbid('XGROUP CREATE', key) end
  if not redis.acl_check_cmd('XGROUP', 'DESTROY', key, 'g') then forbid('XGROUP DESTROY', key) end
end

-- Executes a command that writes nothing. Redis 7.0 reports a missing permission without the code NOPERM.
local function look(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    if string.find(answer.err, "can't run this command", 1, true) then forbid(...) end
    error(answer)
  end
  return answer
end

-- ## Time and reign

local function look_at_reign(now)
  local info = look('INFO', 'replication', 'cluster')
  local id = string.match(info, 'master_replid:(%x+)') or string.match(look('INFO', 'server'), 'run_id:(%x+)')
  if not id then
    unproven = unproven or redis.sha1hex(now .. tostring({}))
    id = unproven
  end
  if string.find(info, 'cluster_enabled:1', 1, true) then id = look('CLUSTER', 'MYID') .. ':' .. id end
  if id ~= writer then
    writer, tag = id, string.format('%07d', tonumber(string.sub(redis.sha1hex(id), 1, 9), 16) % 10000000)
    young, old, count = {}, {}, 0
    floor = newest + 1
  end
  looked_at = now
end

-- Milliseconds since 1970.
local function look_at_clock()
  local time = look('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if not looked_at or now - looked_at >= REIGN_MS or now < looked_at then look_at_reign(now) end
  return now
end

-- An epoch that begins now, after that of `ms`.
local function new_epoch(now, ms)
  now = now - YEAR_2020_MS
  if now > newest then newest = now end
  return string.format('%.0f', math.max(now, floor, ms + 1)) .. tag
end

-- ## The log as it is in Redis

-- nil: there is none. false: it is something else. Otherwise its newest cursor (`id`, `epoch`, `ms`, `offset`), and from
-- its group: `writer`, `size`, `ttl`, and `groups`, the names of all of them.
local function inspect(key)
  local info = redis.pcall('XINFO', 'STREAM', key)
  if info.err then
    if string.find(info.err, 'no such key', 1, true) then return nil end
    if string.find(info.err, '^WRONGTYPE') then return false end
    if string.find(info.err, "can't run this command", 1, true) then forbid('XINFO STREAM', key) end
    error(info)
  end
  local log = { groups = {} }
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then log.id = info[i + 1] end
  end
  local epoch, offset = string.match(log.id, '^(%d+)-(%d+)$')
  log.epoch, log.ms, log.offset = epoch, tonumber(string.sub(epoch, 1, -8)) or 0, tonumber(offset)
  if log.ms >= MAX_EPOCH_MS or log.offset >= MAX_OFFSET then return false end
  for _, group in ipairs(look('XINFO', 'GROUPS', key)) do
    local by, size, ttl = string.match(group[2], '^tidegate writer=(%S+) size=(%d+) ttl=(%w+)$')
    if by then
      log.groups[#log.groups + 1] = group[2]
      log.writer, log.size, log.ttl = by, tonumber(size), tonumber(ttl) or NEVER
    end
  end
  return log
end

-- Whether the writer of the log is another master of this cluster that still reigns.
local function is_moved(log)
  local by = log.writer and string.match(log.writer, '^(%x+):')
  if not by or by == string.match(writer, '^(%x+):') then return false end
  for line in string.gmatch(look('CLUSTER', 'NODES'), '[^\n]+') do
    local node, flags = string.match(line, '^(%x+) %S+ (%S+)')
    if node == by then return string.find(flags, 'master', 1, true) and not string.find(flags, 'fail', 1, true) end
  end
  return false
end

-- Saves the policy and the writer with the log.
local function save_group(key, room, by, others)
  room.group = 'tidegate writer=' .. by .. ' size=' .. string.format('%.0f', room.size) .. ' ttl='
    .. (room.ttl == NEVER and NEVER or string.format('%.0f', room.ttl))
  local saved = false
  for _, group in ipairs(others) do
    if group == room.group then saved = true else redis.call('XGROUP', 'DESTROY', key, group) end
  end
  if not saved then redis.call('XGROUP', 'CREATE', key, room.group, '$', 'MKSTREAM') end
end

-- Lets the key expire after its ttl. An eighth more, because it is renewed only when an eighth has passed.
local function renew_expiry(key, room, now)
  if room.ttl == NEVER then
    redis.call('PERSIST', key)
    room.due = nil
  else
    local eighth = math.floor(room.ttl / 8)
    redis.call('PEXPIRE', key, string.format('%.0f', room.ttl + eighth))
    room.due = now + eighth
  end
end

-- ## Publishing

local function xadd(key, size, id, message, link, w)
  local command = { 'XADD', key, 'MAXLEN', '~', string.format('%.0f', size), id, 'd', message }
  if link then
    command[#command + 1], command[#command + 2] = 'p', link
  end
  if w then
    command[#command + 1], command[#command + 2] = 'w', w
  end
  return redis.call(unpack(command))
end

-- Appends where the newest cursor is known. nil if it is not what was known: then nothing is appended.
local function append_to_known(key, room, size, message, w)
  local id
  if w then
    id = redis.pcall('XADD', key, 'NOMKSTREAM', 'MAXLEN', '~', size, room.epoch .. '-*', 'd', message, 'w', w)
  else
    id = redis.pcall('XADD', key, 'NOMKSTREAM', 'MAXLEN', '~', size, room.epoch .. '-*', 'd', message)
  end
  if id == room.epoch .. '-' .. (room.offset + 1) then
    room.offset = room.offset + 1
    return id
  end
  -- An older log was restored under this key, or the key is that of another database.
  if type(id) == 'string' then redis.call('XDEL', key, id) end
  return nil
end

-- Appends after a look at the log. Returns the cursor, the link if there is one, and the room; or false if there is no
-- log to append to. `known`: what was wrong about the room, if it was known.
local function append_to_any(key, topic, options, message, now, known)
  local log = inspect(key)
  if log == false then return false end
  if log and log.id == '0-0' then log = { groups = log.groups, ms = 0, offset = 0 } end

  local room = { topic = topic }
  room.size = options.size or (log and log.size) or (known and known.size) or DEFAULT_SIZE
  room.ttl = options.ttl or (log and log.ttl) or (known and known.ttl) or DEFAULT_TTL_MS
  permit_group(key)
  permit_expiry(key, room.ttl)

  local link
  local is_mine = log and log.writer == writer and string.sub(log.epoch, -7) == tag
  if is_mine and not (known and (known.epoch ~= log.epoch or known.offset ~= log.offset)) then
    room.epoch, room.offset = log.epoch, log.offset + 1
  else
    local ms = known and tonumber(string.sub(known.epoch, 1, -8)) or 0
    room.epoch = new_epoch(now, math.max(ms, log and log.ms or 0))
    room.offset = 1
    if log then
      room.offset = math.max(log.offset, known and known.offset or 0) + 1
      if log.id then link = (is_moved(log) and 'm ' or 'u ') .. log.id end
    end
  end
  local id = xadd(key, room.size, room.epoch .. '-' .. room.offset, message, link, options.w)
  save_group(key, room, writer, log and log.groups or {})
  renew_expiry(key, room, now)
  remember(key, room)
  return id, link
end

local function publish(keys, args)
  local key, id_key = keys[1], keys[2]
  if not key or #keys > 2 then return redis.error_reply('BADKEY expected one or two keys') end
  if not args[1] then return redis.error_reply('BADOPTION expected a payload') end
  local options, wrong = options_of(args, 2, PUBLISH_OPTIONS)
  if not options then return redis.error_reply(wrong) end
  local message
  message, wrong = message_of(args[1], options)
  if not message then return redis.error_reply(wrong) end

  local now = look_at_clock()
  local room = recall(key)
  local topic = room and room.topic
  if not topic then
    topic, wrong = topic_of(key)
    if not topic then return redis.error_reply(wrong) end
  end
  permit('XADD', key, '*', 'd', '')
  permit('PUBLISH', topic, '')
  if id_key then
    if not is_id_key(id_key, key) then
      return redis.error_reply('BADKEY expected the key ' .. shown(string.sub(key, 1, -5) .. ':id:<id>') .. ' with an id of 1 to 128 '
        .. 'bytes, got ' .. shown(id_key))
    end
    permit('SET', id_key, '')
    local cursor = look('GET', id_key)
    if cursor then return { cursor, 1 } end
  end

  local id, link
  if room then
    local size, ttl = options.size or room.size, options.ttl or room.ttl
    local changed = size ~= room.size or ttl ~= room.ttl
    local renew = changed or room.due and now >= room.due
    if changed then permit_group(key) end
    if renew then permit_expiry(key, ttl) end
    id = append_to_known(key, room, size, message, options.w)
    if id then
      if changed then
        room.size, room.ttl = size, ttl
        save_group(key, room, writer, { room.group })
      end
      if renew then renew_expiry(key, room, now) end
    end
  end
  if not id then
    id, link = append_to_any(key, topic, options, message, now, room)
  end
  if id_key then redis.call('SET', id_key, id or '', 'PX', ID_TTL_MS) end
  if options.w then
    local name, number = string.match(options.w, WRITTEN)
    if name then note_number(name, tonumber(number)) end
  end
  if not id then
    redis.call('PUBLISH', topic, message)
    return { '', 0 }
  end
  redis.call('PUBLISH', topic, '\245Th' .. id .. (link and ' ' .. link or '') .. '\n' .. message)
  return { id, 0 }
end

-- ## Opening and clearing

-- The log as it is, made if there is none, with its policy as the options say. Returns it, or nil and an error.
local function opened(keys, args, known_options)
  local key = keys[1]
  if #keys ~= 1 then return nil, 'BADKEY expected one key' end
  local options, wrong = options_of(args, 1, known_options)
  if not options then return nil, wrong end
  local topic
  topic, wrong = topic_of(key)
  if not topic then return nil, wrong end
  local now = look_at_clock()
  permit_group(key)

  local known, log = recall(key), inspect(key)
  if log == false then
    return nil, 'BADLOG ' .. shown(key) .. ' holds something that is no log of a room: delete it'
  end
  local room = { topic = topic }
  room.size = options.size or (log and log.size) or (known and known.size) or DEFAULT_SIZE
  room.ttl = options.ttl or (log and log.ttl) or (known and known.ttl) or DEFAULT_TTL_MS
  permit_expiry(key, room.ttl)
  if not log or log.id == '0-0' then
    permit('XSETID', key, '0-1')
    room.epoch = new_epoch(now, known and tonumber(string.sub(known.epoch, 1, -8)) or 0)
    room.offset = 0
    save_group(key, room, writer, log and log.groups or {})
    log = { id = room.epoch .. '-0' }
    redis.call('XSETID', key, log.id)
    renew_expiry(key, room, now)
    remember(key, room)
  elseif log.writer and (room.size ~= log.size or room.ttl ~= log.ttl) then
    -- Still the same writer: a fence comes with the next message.
    save_group(key, room, log.writer, log.groups)
    if room.ttl ~= log.ttl then renew_expiry(key, room, now) end
    forget(key)
  end
  return log
end

local function open(keys, args)
  local log, wrong = opened(keys, args, OPEN_OPTIONS)
  return log and log.id or redis.error_reply(wrong)
end

local function clear(keys, args)
  if keys[1] then permit('XTRIM', keys[1], 'MAXLEN', '0') end
  local log, wrong = opened(keys, args, CLEAR_OPTIONS)
  if not log then return redis.error_reply(wrong) end
  redis.call('XTRIM', keys[1], 'MAXLEN', 0)
  return log.id
end

-- ## Verifying

local function begin(keys, args)
  if #keys > 0 then return redis.error_reply('BADKEY expected no key') end
  local name = #args == 1 and #args[1] <= 40 and string.match(args[1], '^%w+$')
  if not name then return redis.error_reply('BADOPTION expected the name of a writer: 1 to 40 letters and digits') end
  note_number(name, last_number(name) or 0)
  return 0
end

local function verify(keys, args)
  local key = keys[1]
  if #keys ~= 1 then return redis.error_reply('BADKEY expected one key') end
  local name, first = args[1], args[2] and integer(args[2], 1, MAX_OFFSET)
  if #args ~= 2 or not first then return redis.error_reply('BADOPTION expected a writer and a number') end
  local _, wrong = topic_of(key)
  if wrong then return redis.error_reply(wrong) end
  local last = last_number(name) or -1
  local answer = { last, 0 }
  if last >= 0 and last < first then return answer end
  local before, seen, oldest = '+', 0, nil
  while seen < VERIFY_MOST do
    local entries = look('XREVRANGE', key, before, '-', 'COUNT', VERIFY_BATCH)
    for _, entry in ipairs(entries) do
      local fields = entry[2]
      for i = 1, #fields, 2 do
        if fields[i] == 'w' then
          local by, number = string.match(fields[i + 1], WRITTEN)
          number = by == name and tonumber(number)
          if number and number < first then
            answer[2] = 1
            return answer
          elseif number then
            answer[#answer + 1], answer[#answer + 2] = number, entry[1]
          end
        end
      end
      oldest, before = entry[1], '(' .. entry[1]
    end
    seen = seen + #entries
    if #entries < VERIFY_BATCH then
      if oldest and string.match(oldest, '%-(%d+)$') == '1' then answer[2] = 2 end
      break
    end
  end
  return answer
end

redis.register_function('tidegate_publish', publish)
redis.register_function({ function_name = 'tidegate_begin', callback = begin, flags = { 'no-writes' } })
redis.register_function({ function_name = 'tidegate_verify', callback = verify, flags = { 'no-writes' } })
redis.register_function('tidegate_open', open)
redis.register_function('tidegate_clear', clear)
redis.register_function({
  function_name = 'tidegate_version',
  callback = function() return VERSION end,
  flags = { 'no-writes' },
})
