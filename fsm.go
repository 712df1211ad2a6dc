package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// A command is one change to the replicated state and the only thing ever written to
// the raft log. Fields may be added; none may change its meaning, for new binaries
// replay old logs.
//
// Whatever is not a function of the log is decided by the proposer and carried here: the
// time, the author, any random number. Apply looks at nothing else.
type command struct {
	Op      string   `json:"op"` // see batch.run
	NS      string   `json:"ns"`
	Changes []change `json:"changes,omitempty"` // in byte order of the keys, each key once
	Meta    *nsMeta  `json:"meta,omitempty"`    // of describe; CreatedAt is ignored
	// Node is who is added or changed, removed, or asked to lead. Known are the members that the
	// leader knows by its file alone, of member and unmember.
	Node   *nodeRecord  `json:"node,omitempty"`
	Known  []nodeRecord `json:"known,omitempty"`
	Trim   *trimming    `json:"trim,omitempty"` // of trim and sweep
	If     condition    `json:"if,omitzero"`    // checked when applied, never before
	Actor  string       `json:"actor"`          // the principal, never the key
	Source string       `json:"source"`         // the client's IP address
	ID     string       `json:"id"`             // the correlation id
	At     int64        `json:"at"`             // the leader's clock, nanoseconds since 1970
	// Until is when the leader gives the request up, by its clock, nanoseconds since 1970. raft
	// notes when it appends an entry; one that was appended later changes nothing, so that whoever
	// was told "unknown" knows after that time that the write is in the log or never will be.
	Until int64 `json:"until,omitempty"`

	Restore *restoring `json:"restore,omitempty"` // of stage, restore and unstage
}

// A change is a new value of one key, or its removal if Value is nil.
type change struct {
	Key   string  `json:"k"`
	Value *string `json:"v,omitempty"`
	Type  string  `json:"t,omitempty"`
}

// The data of a raft entry is
//
//	crc[4] *( command LF )
//
// where crc is CRC-32C of what follows, big-endian, and a command is JSON. Commands of one
// entry are applied one after the other, each with a revision of its own.

// appendTo appends the command and the line feed.
func (c *command) appendTo(b []byte) ([]byte, error) {
	buf := bytes.NewBuffer(b)
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(c)
	return buf.Bytes(), err
}

// sealCommands puts the checksum in front of commands, where four bytes were left free.
func sealCommands(data []byte) []byte {
	binary.BigEndian.PutUint32(data, crc32.Checksum(data[4:], castagnoli))
	return data
}

// decodeCommands reads the commands of an entry.
func decodeCommands(data []byte) ([]*command, error) {
	if err := checkCommand(data); err != nil {
		return nil, err
	}
	var cs []*command
	for line := range bytes.Lines(data[4:]) {
		c := new(command)
		if err := json.Unmarshal(line, c); err != nil {
			return nil, err
		}
		cs = append(cs, c)
	}
	return cs, nil
}

// checkCommand checks the checksum of a raft entry's data.
func checkCommand(data []byte) error {
	if len(data) < 4 || binary.BigEndian.Uint32(data) != crc32.Checksum(data[4:], castagnoli) {
		return errCorrupt
	}
	return nil
}

// A result is what Apply says of a command. Every node computes it; only the one that
// proposed it has a reader for it.
type result struct {
	err     error  // a refusal: nothing was changed
	rev     uint64 // revision of the change, or the store's where nothing changed
	created bool   // the key or namespace was not there before
	changed int    // number of keys that changed
	etag    uint64 // revision of the thing afterwards
	body    []byte // the entry or the namespace afterwards, JSON
}

// An fsm applies raft's log to a store.
type fsm struct {
	store *store
	log   *slog.Logger
	disk  *disk
	// halt ends the process. A replica that skips what it cannot read or store is a
	// replica that differs, so Apply does not return from an error.
	halt func(error)
}

// Apply implements raft.FSM; raft calls ApplyBatch instead.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// applyBytes is how much of the log a transaction takes, and the entry that goes beyond. Its commands
// may change a key for each 40 bytes: raft hands over as many entries as an append has, and all
// in one transaction would take longer than the watchdog allows a disk, at each start again.
const applyBytes = 256 << 10

// ApplyBatch implements raft.BatchingFSM.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, 0, len(logs))
	for len(logs) > 0 {
		n, size := 1, len(logs[0].Data)
		for n < len(logs) && size < applyBytes {
			size += len(logs[n].Data)
			n++
		}
		out = append(out, f.applyLogs(logs[:n])...)
		logs = logs[n:]
	}
	return out
}

// applyLogs applies logs in one transaction, with the note that they are done, so that a crash
// neither loses a command nor runs it twice. The response of an entry is a []*result, one for
// each of its commands; a refusal is a result.
func (f *fsm) applyLogs(logs []*raft.Log) []any {
	allow, done := f.disk.watched("write to " + f.store.path())
	defer done()
	f.store.allow = allow
	var out []any
	err := f.store.guarded(func() (err error) {
		out, err = f.store.apply(logs)
		return err
	})
	if err == nil {
		return out
	}
	next := checkDisk
	switch {
	case errors.Is(err, errEntry):
		next = "if confman was made older, start the newer one; else " + rejoinEmpty
	case errors.Is(err, errCorrupt):
		next = rebuildState
	}
	f.halt(fmt.Errorf("apply raft entries %d to %d to %s: %w; %s", logs[0].Index, logs[len(logs)-1].Index, f.store.path(), err, next))
	return nil
}

// errEntry is in every error about a raft entry that this program cannot read.
var errEntry = errors.New("not a command that this confman knows")

// apply is ApplyBatch. The error is the disk's or a corrupt record's; the store is
// then as it was before.
func (s *store) apply(logs []*raft.Log) ([]any, error) {
	out := make([]any, len(logs))
	old, start := s.at(), time.Now()
	b := &batch{pos: *old, namespaces: map[string]*namespace{}, allow: s.allow}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		b.open(tx)
		for i, l := range logs {
			if l.Index <= b.pos.index {
				continue // replayed after a restart; nobody is waiting for it
			}
			b.pos.index = l.Index
			if l.Type != raft.LogCommand {
				continue // a batch is handed configuration entries too
			}
			cs, err := decodeCommands(l.Data)
			if err != nil {
				return fmt.Errorf("raft entry %d: %w: %w", l.Index, errEntry, err)
			}
			results := make([]*result, len(cs))
			for j, c := range cs {
				if c.Until != 0 && l.AppendedAt.UnixNano() > c.Until {
					results[j] = &result{err: errLate}
				} else if results[j], err = b.run(c); err != nil {
					return fmt.Errorf("raft entry %d: %w", l.Index, err)
				}
			}
			out[i] = results
		}
		return b.finish()
	})
	if err != nil {
		return nil, err
	}
	s.spare.Store(max(0, s.spare.Load()+b.freed))
	if b.pos.index != old.index {
		s.pos.Store(&b.pos)
		s.applied.ring()
		s.applying.observe(time.Since(start))
	}
	if b.joined {
		s.joined.ring()
	}
	if b.pos.rev != old.rev {
		s.changed.ring() // after the commit, so whoever wakes finds the change
		if b.everything {
			s.watches.ringAll()
		} else {
			s.watches.ring(append(b.touched, nil))
		}
	}
	return out, nil
}

// A batch is a transaction that applies commands.
type batch struct {
	tx            *bbolt.Tx
	config, trail *bbolt.Bucket
	pos           position              // as the transaction has it so far
	namespaces    map[string]*namespace // those looked up; written by finish if dirty
	dirty         []string
	touched       [][]byte            // what changed, as watches names it
	everything    bool                // all that anybody waits for may have changed
	allow         func(time.Duration) // see disk.watched; nil for nobody who watches
	joined        bool                // a membership record changed
	freed         int64               // bytes taken out of the trail, less those added
}

func (b *batch) open(tx *bbolt.Tx) {
	b.tx, b.config, b.trail = tx, tx.Bucket(bucketConfig), tx.Bucket(bucketTrail)
	// Keys of the trail only grow, so a page is never split in the middle.
	b.trail.FillPercent = 0.95
}

// writeNamespaces writes those that have changed, and forgets all that were looked up.
func (b *batch) writeNamespaces() error {
	for _, ns := range b.dirty {
		if err := b.namespaces[ns].put(b.tx, ns); err != nil {
			return err
		}
	}
	clear(b.namespaces)
	b.dirty = nil
	return nil
}

// finish writes what the commands of the batch share.
func (b *batch) finish() error {
	if err := b.writeNamespaces(); err != nil {
		return err
	}
	meta := b.tx.Bucket(bucketMeta)
	for _, m := range []struct {
		name  string
		value []byte
	}{
		{"applied", binary.BigEndian.AppendUint64(nil, b.pos.index)},
		{"revision", binary.BigEndian.AppendUint64(nil, b.pos.rev)},
		{"time", binary.BigEndian.AppendUint64(nil, uint64(b.pos.nanos))},
		{"hash", b.pos.hash[:]},
		{"events", binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, b.pos.events), b.pos.rev)},
	} {
		k := []byte(m.name)
		if err := meta.Put(k, seal(k, append(make([]byte, 4, 36), m.value...))); err != nil {
			return err
		}
	}
	return nil
}

// namespace returns a namespace's record for change, nil where it never was.
func (b *batch) namespace(ns string) (*namespace, error) {
	if n, ok := b.namespaces[ns]; ok {
		return n, nil
	}
	n, err := getNamespace(b.tx, ns)
	if err == nil && n != nil {
		b.namespaces[ns] = n
	}
	return n, err
}

// touch says that namespace ns changes in the revision being made.
func (b *batch) touch(ns string, n *namespace) {
	n.rev = b.pos.rev
	if !slices.Contains(b.dirty, ns) {
		b.dirty = append(b.dirty, ns)
		b.touched = append(b.touched, []byte(ns))
	}
}

// run applies one command. A refusal is in the result, decided before anything is
// written; the error is the disk's, or says that this program cannot read the log.
func (b *batch) run(c *command) (*result, error) {
	switch c.Op {
	case "set", "delete", "patch":
		return b.change(c)
	case "describe":
		return b.describe(c)
	case "drop":
		return b.drop(c)
	case "member", "unmember", "lead":
		switch {
		case c.Node == nil:
			return nil, fmt.Errorf("%w: op %s without a node", errEntry, c.Op)
		case c.Op == "lead":
			return b.lead(c)
		}
		return b.member(c)
	case "trim":
		return b.trim(c)
	case "sweep":
		return b.sweep(c)
	}
	if c.Restore != nil {
		switch c.Op {
		case "stage":
			return b.stage(c)
		case "restore":
			return b.restore(c)
		case "unstage":
			res := &result{rev: b.pos.rev}
			if id, _, err := stagedSoFar(b.tx); err != nil || id != c.Restore.ID {
				return res, err
			}
			return res, b.unstage()
		}
	}
	return nil, fmt.Errorf("%w: unknown op %q", errEntry, c.Op)
}

// next begins the revision that c makes. Times never decrease along the log, whatever
// the clocks of successive leaders say.
func (b *batch) next(c *command) string {
	b.pos.rev++
	b.pos.nanos = max(b.pos.nanos, c.At)
	return stamp(b.pos.nanos)
}

// reborn returns the record of a namespace that is there, making it if need be.
func (b *batch) reborn(ns string, n *namespace, owner, now string) *namespace {
	if n == nil {
		n = &namespace{}
		b.namespaces[ns] = n
	} else if !n.deleted {
		return n
	}
	n.deleted = false
	n.nsMeta = nsMeta{Owner: owner, CreatedAt: now}
	return n
}

// change applies set, delete and patch: all of the command's changes in one revision,
// or nothing.
func (b *batch) change(c *command) (*result, error) {
	n, err := b.namespace(c.NS)
	if err != nil {
		return nil, err
	}
	there := n != nil && !n.deleted

	type found struct {
		key   []byte
		old   entryRecord
		ok    bool
		entry entry // decoded if ok
	}
	olds := make([]found, len(c.Changes))
	var work []int // those that change something
	for i, ch := range c.Changes {
		f := &olds[i]
		f.key = entryKey(c.NS, ch.Key)
		if f.old, f.ok, err = getEntry(b.tx, f.key); err != nil {
			return nil, err
		}
		if f.ok {
			if f.entry, err = f.old.decode(); err != nil {
				return nil, err
			}
		}
		switch {
		case ch.Value == nil && !f.ok:
		case ch.Value != nil && f.ok && f.entry.Value == *ch.Value && f.entry.Type == ch.Type:
		default:
			work = append(work, i)
		}
	}

	// What the condition is about: the key, or of a patch the namespace.
	if c.If.given() {
		var cur *current
		switch {
		case c.Op == "patch" && there:
			if cur, err = namespaceCurrent(b.tx, n); err != nil {
				return nil, err
			}
		case c.Op != "patch" && olds[0].ok:
			cur = &current{olds[0].entry.Revision, olds[0].entry.UpdatedBy, olds[0].entry.UpdatedAt}
		}
		if err := c.If.check(cur); err != nil {
			return &result{err: err}, nil
		}
	}
	if c.Op == "delete" && !olds[0].ok {
		return &result{err: errNotFound.because("there is no key %s in namespace %s", c.Changes[0].Key, c.NS)}, nil
	}
	if len(work) == 0 {
		res := &result{rev: b.pos.rev}
		if c.Op == "set" {
			res.etag, res.body = olds[0].old.rev, bytes.Clone(olds[0].old.json)
		} else if there {
			res.etag = n.rev
		}
		return res, nil
	}

	now := b.next(c)
	n = b.reborn(c.NS, n, c.Actor, now)
	b.touch(c.NS, n)
	res := &result{rev: b.pos.rev, etag: b.pos.rev, changed: len(work), created: !olds[work[0]].ok}
	for i, w := range work {
		ch, f := c.Changes[w], &olds[w]
		b.touched = append(b.touched, f.key)
		at := place{b.pos.rev, uint16(i)}
		ev := &event{
			ID: strconv.FormatUint(at.rev, 10) + "-" + strconv.Itoa(i), Revision: at.rev, Timestamp: now,
			Actor: c.Actor, Namespace: c.NS, Key: ch.Key, CorrelationID: c.ID, Source: c.Source,
		}
		if f.ok {
			ev.OldValue = &f.entry.Value
		}
		if ch.Value == nil {
			ev.Action, ev.Type, ev.Version = "config.delete", f.entry.Type, f.old.version
			if err := b.appendTrail(ev, n, at, nil); err != nil {
				return nil, err
			}
			if err := b.config.Delete(f.key); err != nil {
				return nil, err
			}
			n.keys--
			continue
		}
		ev.Action, ev.Type, ev.Version, ev.NewValue = "config.set", ch.Type, f.old.version+1, ch.Value
		evPlaces, places := nextPlaces(f.old.places, ev.Version, at)
		if err := b.appendTrail(ev, n, at, evPlaces); err != nil {
			return nil, err
		}
		e := entry{
			Namespace: c.NS, Key: ch.Key, Value: *ch.Value, Type: ch.Type,
			Version: ev.Version, Revision: at.rev, UpdatedAt: now, UpdatedBy: c.Actor,
		}
		rec, text := e.record(f.key, places)
		if c.Op == "set" {
			res.body = text
		}
		if err := b.config.Put(f.key, rec); err != nil {
			return nil, err
		}
		if !f.ok {
			n.keys++
		}
	}
	return res, nil
}

// record is the entry as it is stored under k, with its places; text is the part of it that is sent.
func (e *entry) record(k, places []byte) (rec, text []byte) {
	rec = make([]byte, 4, 320+len(places)+len(e.Key)+len(e.Value))
	rec = binary.BigEndian.AppendUint64(rec, e.Revision)
	rec = binary.BigEndian.AppendUint64(rec, e.Version)
	rec = append(rec, byte(len(places)/10))
	rec = append(rec, places...)
	start := len(rec)
	rec = e.appendTo(rec)
	return seal(k, rec), rec[start:]
}

// describe applies a change of a namespace's metadata, or makes the namespace.
func (b *batch) describe(c *command) (*result, error) {
	n, err := b.namespace(c.NS)
	if err != nil {
		return nil, err
	}
	there := n != nil && !n.deleted
	if res, err := b.refuse(c, n); res != nil || err != nil {
		return res, err
	}
	if there && n.Description == c.Meta.Description && n.Owner == c.Meta.Owner {
		return &result{rev: b.pos.rev, etag: n.rev, body: n.appendTo(nil, c.NS)}, nil
	}
	var old *string
	if there {
		old = n.metaText()
	}
	now := b.next(c)
	n = b.reborn(c.NS, n, c.Actor, now)
	n.Description, n.Owner = c.Meta.Description, c.Meta.Owner
	b.touch(c.NS, n)
	if err := b.namespaceEvent(c, n, now, "namespace.set", old, n.metaText()); err != nil {
		return nil, err
	}
	return &result{rev: b.pos.rev, etag: n.rev, created: !there, body: n.appendTo(nil, c.NS)}, nil
}

// drop applies the removal of a namespace that holds no keys.
func (b *batch) drop(c *command) (*result, error) {
	n, err := b.namespace(c.NS)
	if err != nil {
		return nil, err
	}
	if res, err := b.refuse(c, n); res != nil || err != nil {
		return res, err
	}
	if n == nil || n.deleted {
		return &result{err: errNotFound.because("there is no namespace %s", c.NS)}, nil
	}
	if n.keys > 0 {
		return &result{err: errConflict.because("namespace %s still holds keys, %d in number; delete them first", c.NS, n.keys)}, nil
	}
	now := b.next(c)
	b.touch(c.NS, n)
	if err := b.namespaceEvent(c, n, now, "namespace.delete", n.metaText(), nil); err != nil {
		return nil, err
	}
	n.deleted = true
	return &result{rev: b.pos.rev, etag: n.rev}, nil
}

// refuse checks the condition of a command about a namespace; nil, nil is leave to go on.
func (b *batch) refuse(c *command, n *namespace) (*result, error) {
	if !c.If.given() {
		return nil, nil
	}
	var cur *current
	if n != nil && !n.deleted {
		var err error
		if cur, err = namespaceCurrent(b.tx, n); err != nil {
			return nil, err
		}
	}
	if err := c.If.check(cur); err != nil {
		return &result{err: err}, nil
	}
	return nil, nil
}

func (b *batch) namespaceEvent(c *command, n *namespace, now, action string, old, new *string) error {
	ev := &event{
		ID: strconv.FormatUint(b.pos.rev, 10) + "-0", Revision: b.pos.rev, Timestamp: now, Action: action,
		Actor: c.Actor, Namespace: c.NS, Type: "json", OldValue: old, NewValue: new, CorrelationID: c.ID, Source: c.Source,
	}
	return b.appendTrail(ev, n, place{b.pos.rev, 0}, nil)
}

// storeEvent writes the event of a command that is about no namespace, in the revision that next has
// begun; subject takes the place of a key. Only those who may see all of the trail see it, but for that of
// a restore, see newestFirst.
func (b *batch) storeEvent(c *command, now, action, subject string, old, new *string) error {
	ev := &event{
		ID: strconv.FormatUint(b.pos.rev, 10) + "-0", Revision: b.pos.rev, Timestamp: now, Action: action,
		Actor: c.Actor, Key: subject, Type: "json", OldValue: old, NewValue: new, CorrelationID: c.ID, Source: c.Source,
	}
	return b.appendTrail(ev, nil, place{b.pos.rev, 0}, nil)
}

// Snapshot implements raft.FSM. It only begins a read transaction, so that Apply goes on
// beside Persist.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	tx, err := f.store.begin()
	if err != nil {
		return nil, err
	}
	return &snapshot{tx: tx, log: f.log, halt: f.halt}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	start := time.Now()
	if err := f.store.replace(r); err != nil {
		next := checkDisk
		if errors.Is(err, errCorrupt) {
			next = rejoinEmpty
		}
		// raft would take an older snapshot, or ask for this one again and again.
		f.halt(fmt.Errorf("restore %s from a snapshot: %w; %s", f.store.path(), err, next))
	}
	pos := f.store.at()
	f.log.Info("state restored from snapshot", "revision", pos.rev, "index", pos.index, "took", time.Since(start))
	return nil
}

// A snapshot is the state file as it was when the transaction began, page for page. It
// needs no format of its own, costs no decoding, and restoring one is a copy.
type snapshot struct {
	tx   *bbolt.Tx
	log  *slog.Logger
	halt func(error)
}

// Persist implements raft.FSMSnapshot.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	start := time.Now()
	if err := checkRecords(s.tx); err != nil {
		sink.Cancel()
		s.halt(fmt.Errorf("snapshot: %w; %s", err, rebuildState))
	}
	n, err := s.tx.WriteTo(sink)
	if err != nil {
		sink.Cancel()
		return fmt.Errorf("write snapshot %s: %w", sink.ID(), err)
	}
	if err := sink.Close(); err != nil {
		return fmt.Errorf("close snapshot %s: %w", sink.ID(), err)
	}
	s.log.Info("snapshot written", "id", sink.ID(), "bytes", n, "took", time.Since(start))
	return nil
}

// Release implements raft.FSMSnapshot.
func (s *snapshot) Release() { s.tx.Rollback() }
