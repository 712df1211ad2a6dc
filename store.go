package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// A store is the replicated state of one node: a single bbolt file.
//
// In the tables below name[n] is a field of n bytes and name[] runs to the end.
// Integers are unsigned and big-endian, so bbolt's byte order is numeric order
// and a cursor walks a range of revisions without decoding. A place is the
// position of an event in the trail, rev[8] n[2]; a place of zeros is none.
// Values marked JSON are sent to clients as they stand.
//
//	bucket      key           value
//	meta        "format"      version[4]; this text describes versions 1, without "cut", and 2
//	meta        "applied"     crc[4] index[8] of the last raft entry in this file
//	meta        "revision"    crc[4] rev[8]
//	meta        "time"        crc[4] nanoseconds[8] since 1970 of the newest event
//	meta        "hash"        crc[4] SHA-256[32] of the newest event
//	meta        "events"      crc[4] count[8] of events behind the cut, at rev[8]
//	meta        "cut"         crc[4] place[10] and SHA-256[32] of the newest event that was trimmed
//	config      ns[] 00 key[] crc[4] rev[8] version[8] k[1] place[10]*k entry[], JSON
//	namespaces  ns[]          crc[4] flags[1] keys[8] rev[8] place[10] meta[], JSON of nsMeta
//	trail       rev[8] n[2]   crc[4] place[10] k[1] place[10]*k event[], JSON
//	members     id[]          crc[4] JSON of nodeRecord
//	meta        "restores"    crc[4] place[10]* of the events store.restore, oldest first; or none
//	staging                   see bucketStaging
//
// A file of an earlier confman has no bucket members; it is made when the file is opened.
//
// Neither ns nor key may contain a zero byte, so 00 separates them and one
// cursor lists a namespace in order. crc is CRC-32C over the key and all of the
// value that follows it.
//
// There are no indexes beside these. A namespace's record holds the place of its
// newest event (flag 1 says that the namespace itself is deleted and only its
// trail remains), and each event's first place is the event before it in the
// same namespace. The k places of an entry and of an event form a skip list over
// the versions of one key: an entry's i-th place is that of its newest version
// divisible by 2^i, and the i-th of an event of version v (v divisible by 2^i) is
// that of version v-2^i. So an earlier version is found in O(log n) lookups and
// each change is stored once, at the end of the trail.
//
// What the trail holds up to the cut is not there for any reader: it is about to be deleted, see
// retention.go. Places go on pointing to it. A program that knows version 1 only would take that for
// damage, so the first cut makes the file one of version 2.
//
// For example, after key db.url of namespace billing is set for the first time,
// as revision 258:
//
//	config  62 69 6c 6c 69 6e 67 00 64 62 2e 75 72 6c
//	        crc, 00 00 00 00 00 00 01 02, 00 00 00 00 00 00 00 01, 01,
//	        00 00 00 00 00 00 01 02 00 00, {"namespace":"billing",...}
//	trail   00 00 00 00 00 00 01 02 00 00
//	        crc, 00 00 00 00 00 00 00 00 00 00, 00, {"id":"258-0",...}
//
// The raft log is the truth and this file follows it, so it is not fsynced
// (except by Close): openStore says when it is kept.
type store struct {
	dir string

	// mu is held for reading while a transaction begins and for writing while
	// replace changes db; a transaction outlives it.
	mu sync.RWMutex
	db *bbolt.DB

	pos     atomic.Pointer[position] // what is committed; set by Apply's goroutine alone
	changed bell                     // rung after each commit that moved the revision
	applied bell                     // rung after each commit
	joined  bell                     // rung after each commit that changed bucket members
	watches watches                  // who waits for one thing to change
	spare   atomic.Int64             // see sweepAhead; set by Apply's goroutine alone

	allow    func(time.Duration) // see batch; Apply's goroutine alone
	applying histogram           // transactions that applied something
}

const (
	storeFormat   = 1 // of a file whose trail is whole
	trimmedFormat = 2 // and of one that has a cut
)

var (
	bucketMeta       = []byte("meta")
	bucketConfig     = []byte("config")
	bucketNamespaces = []byte("namespaces")
	bucketTrail      = []byte("trail")
	bucketMembers    = []byte("members")

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// A position says how far a store has come: all of the log up to index.
type position struct {
	index uint64 // last raft entry that is in the file
	rev   uint64 // the store's revision; 0 before the first change
	nanos int64  // time of the newest event, nanoseconds since 1970
	hash  [32]byte

	events uint64 // in the trail, behind the cut
	cut    cut
}

// errCorrupt is wrapped by every error that says a stored record is not what was
// written. It is never answered around: whoever meets it stops the node.
var errCorrupt = errors.New("checksum mismatch")

// openStore opens dir/state.db, or an empty one where there is none or where what
// is there cannot be trusted. The file is not fsynced while it is used, so it is
// kept only after a clean stop, or when nothing but the process ended since it was
// opened: the machine has not been started again and the file system has not been
// mounted again, both as noted in state.mark. Else it is removed, and raft builds it
// anew from snapshot and log. how is "new", "kept after a clean stop",
// "kept after a killed process" or "rebuilding after an unclean stop".
func openStore(dir string) (s *store, how string, err error) {
	path, mark := filepath.Join(dir, "state.db"), filepath.Join(dir, "state.mark")
	how, now, err := howState(dir)
	if err != nil {
		return nil, "", err
	}
	if how == stateUnclean {
		if err := os.Remove(path); err != nil {
			return nil, "", err
		}
	}
	// The mark says "in use" before the first write can follow it.
	if err := writeFileSync(mark, []byte(now)); err != nil {
		return nil, "", err
	}
	s = &store{dir: dir}
	if s.db, err = openDB(path); err == nil {
		if err = s.load(); err == nil && strings.HasPrefix(how, "kept") {
			err = viewed(s.db, checkEntries)
		}
		if err != nil {
			s.db.Close()
		}
	}
	if err != nil {
		return nil, "", fmt.Errorf("%w; if the file is damaged, %s", err, rebuildState)
	}
	return s, how, nil
}

// stateUnclean is how a state file is opened that may be anything, see howState.
const stateUnclean = "rebuilding after an unclean stop"

// howState tells how the state file in dir was left and so is opened, and the mark of one that is in use
// now. It changes nothing.
func howState(dir string) (how, now string, err error) {
	if now, err = mountMark(dir); err != nil {
		return "", "", err
	}
	was, err := os.ReadFile(filepath.Join(dir, "state.mark"))
	if err != nil && !os.IsNotExist(err) {
		return "", "", err
	}
	_, err = os.Stat(filepath.Join(dir, "state.db"))
	switch {
	case os.IsNotExist(err):
		how = "new"
	case err != nil:
		return "", "", err
	case string(was) == "clean\n":
		how = "kept after a clean stop"
	case string(was) == now:
		how = "kept after a killed process"
	default:
		how = stateUnclean
	}
	return how, now, nil
}

// checkEntries checks what the checksums of records do not show, because they are in no page's own:
// that no entry is missing, twice, or in the place of another. The trail needs no such check: its
// events name each other.
func checkEntries(tx *bbolt.Tx) error {
	found := map[string]uint64{}
	var last, ns []byte
	err := tx.Bucket(bucketConfig).ForEach(func(k, rec []byte) error {
		if _, err := unseal(bucketConfig, k, rec); err != nil {
			return err
		}
		if last != nil && bytes.Compare(last, k) >= 0 {
			return fmt.Errorf("state.db: bucket config is not in order at key %q: %w", k, errCorrupt)
		}
		last = k
		if !bytes.HasPrefix(k, ns) || ns == nil {
			ns = k[:bytes.IndexByte(k, 0)+1]
		}
		found[string(ns)]++
		return nil
	})
	if err != nil {
		return err
	}
	last = nil
	err = tx.Bucket(bucketNamespaces).ForEach(func(k, rec []byte) error {
		n, err := parseNamespace(k, rec)
		if err == nil && (last != nil && bytes.Compare(last, k) >= 0 || found[string(k)+"\x00"] != n.keys) {
			err = fmt.Errorf("state.db: namespace %q has %d keys, and there are %d: %w", k, n.keys, found[string(k)+"\x00"], errCorrupt)
		}
		delete(found, string(k)+"\x00")
		last = k
		return err
	})
	for ns := range found {
		if err == nil {
			err = fmt.Errorf("state.db: there are keys of a namespace %q, which is not there: %w", ns, errCorrupt)
		}
	}
	return err
}

// removeTemporary removes what a process that was killed in the middle left behind.
func removeTemporary(dir string) error {
	for _, name := range []string{"state.db.restore", "state.mark.tmp", spoolName} {
		if err := os.Remove(dir + "/" + name); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// mountMark names this boot of the machine and this mount of dir's file system.
// Where the kernel cannot say it is different every time, so that nothing is kept.
func mountMark(dir string) (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		boot = fmt.Appendf(nil, "unknown-%d", time.Now().UnixNano())
	}
	// The unique id (Linux 6.8) is never used twice; the older one may be.
	const statxMntIDUnique = 0x4000
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID|statxMntIDUnique, &st); err != nil {
		return "", &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	if st.Mask&(unix.STATX_MNT_ID|statxMntIDUnique) == 0 {
		return fmt.Sprintf("unknown-%d\n", time.Now().UnixNano()), nil
	}
	return fmt.Sprintf("boot %s mount %d device %d:%d\n", strings.TrimSpace(string(boot)), st.Mnt_id, st.Dev_major, st.Dev_minor), nil
}

// writeFileSync replaces path with data, on the disk when it returns.
func writeFileSync(path string, data []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// openDB opens a state file with the options that a store needs.
func openDB(path string) (*bbolt.DB, error) {
	var db *bbolt.DB
	err := caught(func() (err error) {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout:      time.Second,
			FreelistType: bbolt.FreelistMapType,
			NoSync:       true,
			NoGrowSync:   true,
			NoStatistics: true,
			// Address space, not memory. While the file outgrows its map bbolt stops
			// every writer until the last reader is done, and then every reader.
			InitialMmapSize: 16 << 30,
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return db, nil
}

// load makes the buckets of an empty file and reads the position of any other.
func (s *store) load() error {
	err := caught(func() error { return s.db.Update(makeBuckets) })
	if err != nil {
		return fmt.Errorf("initialise %s: %w", s.db.Path(), err)
	}
	pos, err := readPosition(s.db)
	if err != nil {
		return fmt.Errorf("open %s: %w", s.db.Path(), err)
	}
	s.pos.Store(pos)
	return nil
}

// makeBuckets makes what an empty file lacks, or one of an earlier confman.
func makeBuckets(tx *bbolt.Tx) error {
	if tx.Bucket(bucketMeta) != nil {
		if tx.Bucket(bucketMembers) != nil {
			return nil
		}
		_, err := tx.CreateBucket(bucketMembers)
		return err
	}
	for _, name := range [][]byte{bucketMeta, bucketConfig, bucketNamespaces, bucketTrail, bucketMembers} {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	return tx.Bucket(bucketMeta).Put([]byte("format"), binary.BigEndian.AppendUint32(nil, storeFormat))
}

// viewed is db.View for a file of which nothing is known yet.
func viewed(db *bbolt.DB, f func(*bbolt.Tx) error) error {
	return caught(func() error { return db.View(f) })
}

// readPosition reads the meta bucket and checks the format.
func readPosition(db *bbolt.DB) (pos *position, err error) {
	err = viewed(db, func(tx *bbolt.Tx) (err error) {
		pos, err = positionOf(tx)
		return err
	})
	return pos, err
}

// positionOf is readPosition in a transaction.
func positionOf(tx *bbolt.Tx) (*position, error) {
	pos := &position{}
	meta := tx.Bucket(bucketMeta)
	if meta == nil {
		return nil, errors.New("not a state file: no bucket meta")
	}
	f := meta.Get([]byte("format"))
	if len(f) != 4 || binary.BigEndian.Uint32(f) < storeFormat || binary.BigEndian.Uint32(f) > trimmedFormat {
		return nil, fmt.Errorf("format %x, this confman reads %d and %d: written by a newer one?", f, storeFormat, trimmedFormat)
	}
	var hash []byte
	counted := uint64(0) // the revision at which events was right: a program that does not know it leaves it as it is
	for _, m := range []struct {
		name string
		set  func(v []byte)
		size int
	}{
		{"applied", func(v []byte) { pos.index = binary.BigEndian.Uint64(v) }, 8},
		{"revision", func(v []byte) { pos.rev = binary.BigEndian.Uint64(v) }, 8},
		{"time", func(v []byte) { pos.nanos = int64(binary.BigEndian.Uint64(v)) }, 8},
		{"hash", func(v []byte) { hash = v }, 32},
		{"events", func(v []byte) { pos.events, counted = binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:]) }, 16},
		{"cut", func(v []byte) { pos.cut = cutOf(v) }, cutSize},
	} {
		k := []byte(m.name)
		rec := meta.Get(k)
		if rec == nil {
			continue // nothing has been applied yet
		}
		v, err := unseal(bucketMeta, k, rec)
		if err == nil && len(v) != m.size {
			err = fmt.Errorf("state.db: bucket meta, key %q: %w", k, errCorrupt)
		}
		if err != nil {
			return nil, err
		}
		m.set(v)
	}
	copy(pos.hash[:], hash)
	if (pos.cut.at.rev > 0) != (binary.BigEndian.Uint32(f) == trimmedFormat) {
		return nil, fmt.Errorf("state.db: format %x, and the trail is cut behind revision %d: %w", f, pos.cut.at.rev, errCorrupt)
	}
	if counted != pos.rev {
		pos.events = countEvents(tx, pos.cut.at)
	}
	return pos, checkTail(tx, pos)
}

// storedRevision is the store's revision as the transaction sees it.
func storedRevision(tx *bbolt.Tx) uint64 {
	if v := tx.Bucket(bucketMeta).Get([]byte("revision")); len(v) == 12 {
		return binary.BigEndian.Uint64(v[4:])
	}
	return 0
}

// Close makes the file durable and says so in state.mark. Nothing may be applied
// any more.
func (s *store) Close() error {
	if err := s.db.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", s.db.Path(), err)
	}
	if err := s.db.Close(); err != nil {
		return err
	}
	return writeFileSync(filepath.Join(s.dir, "state.mark"), []byte("clean\n"))
}

// at returns what is committed at this moment.
func (s *store) at() *position { return s.pos.Load() }

// path names the state file in messages.
func (s *store) path() string { return filepath.Join(s.dir, "state.db") }

// begin opens a read transaction. The caller ends it with Rollback and keeps no slow
// client waiting inside: pages freed meanwhile cannot be used again.
func (s *store) begin() (*bbolt.Tx, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.db.Begin(false)
}

// view runs f in a read transaction.
func (s *store) view(f func(tx *bbolt.Tx) error) (err error) {
	return s.guarded(func() error {
		tx, err := s.begin()
		if err != nil {
			return err
		}
		defer tx.Rollback()
		return f(tx)
	})
}

// guarded runs f. bbolt panics on a page that cannot be one; that is errCorrupt too.
func (s *store) guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a page that the disk does not give
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: %v: %w", s.path(), p, errCorrupt)
		}
	}()
	return f()
}

// replace makes the state file the one that r holds, as written by a snapshot.
// Only raft's FSM goroutine, or NewRaft, calls it.
func (s *store) replace(r io.Reader) error {
	path, tmp := filepath.Join(s.dir, "state.db"), filepath.Join(s.dir, "state.db.restore")
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", tmp, err)
	}
	db, err := openDB(tmp)
	if err != nil {
		return err
	}
	pos, err := readPosition(db)
	if err == nil {
		err = caught(func() error { return db.Update(makeBuckets) })
	}
	if err != nil {
		db.Close()
		return fmt.Errorf("restore %s: %w", tmp, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		db.Close()
		return err
	}
	s.mu.Lock()
	old := s.db
	s.db = db
	s.pos.Store(pos)
	s.mu.Unlock()
	// A snapshot may be reading the old file still; its Close waits for that.
	go old.Close()
	s.changed.ring()
	s.joined.ring()
	s.watches.ringAll()
	return nil
}

// checkRecords checks the checksum of every record that the transaction sees. A snapshot is a
// copy of pages: one that is damaged must not be handed on.
func checkRecords(tx *bbolt.Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("state.db: %v: %w", p, errCorrupt)
		}
	}()
	for _, name := range [][]byte{bucketConfig, bucketNamespaces, bucketTrail, bucketMembers, bucketStaging} {
		b := tx.Bucket(name)
		if b == nil && (bytes.Equal(name, bucketStaging) || bytes.Equal(name, bucketMembers)) {
			continue // of a restore that is under way, and none in a backup by an earlier confman
		}
		err := b.ForEach(func(k, rec []byte) error {
			_, err := unseal(name, k, rec)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// A place is the position of an event in the trail. The zero place is none.
type place struct {
	rev uint64
	n   uint16
}

func (p place) appendTo(b []byte) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(b, p.rev), p.n)
}

func placeAt(b []byte) place {
	return place{binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:])}
}

// seal puts the checksum of key and record in the record's first four bytes,
// which the writer left free.
func seal(key, rec []byte) []byte {
	binary.BigEndian.PutUint32(rec, crc32.Update(crc32.Update(0, castagnoli, key), castagnoli, rec[4:]))
	return rec
}

// unseal returns what follows the checksum, or errCorrupt.
func unseal(bucket, key, rec []byte) ([]byte, error) {
	if len(rec) < 4 || binary.BigEndian.Uint32(rec) != crc32.Update(crc32.Update(0, castagnoli, key), castagnoli, rec[4:]) {
		return nil, fmt.Errorf("state.db: bucket %s, key %q: %w", bucket, key, errCorrupt)
	}
	return rec[4:], nil
}

// An entryRecord is a stored entry. Its slices are valid for the transaction.
type entryRecord struct {
	rev, version uint64
	places       []byte // k times 10 bytes, see store
	json         []byte
}

// entryKey is the key of an entry in bucket config.
func entryKey(ns, key string) []byte {
	b := make([]byte, 0, len(ns)+1+len(key))
	return append(append(append(b, ns...), 0), key...)
}

// seek returns the first record at or behind key from; k is nil if there is none. bbolt finds it by
// comparing keys, so one that was damaged can lead it astray, and then it ends beside that one, or
// on another page: unless k is from, the records around the place and their order are checked. They
// are of one bucket, named in the error.
func seek(cur *bbolt.Cursor, bucket, from []byte) (k, rec []byte, err error) {
	k, rec = cur.Seek(from)
	if bytes.Equal(k, from) {
		return k, rec, nil
	}
	var before, brec []byte
	if k == nil {
		// While a transaction has removed all records, and they were more than a page had, bbolt's Last
		// never comes to an end.
		if first, _ := cur.First(); first == nil {
			return nil, nil, nil
		}
		before, brec = cur.Last()
	} else if _, err = unseal(bucket, k, rec); err == nil {
		before, brec = cur.Prev()
	}
	if err == nil && before != nil {
		_, err = unseal(bucket, before, brec)
	}
	if err == nil && (k != nil && bytes.Compare(k, from) < 0 || before != nil && bytes.Compare(before, from) >= 0) {
		err = fmt.Errorf("state.db: bucket %s is not in order at key %q: %w", bucket, from, errCorrupt)
	}
	if err != nil {
		return nil, nil, err
	}
	k, rec = cur.Seek(from)
	return k, rec, nil
}

// lookup returns the record of a key, unchecked; nil where there is none.
func lookup(tx *bbolt.Tx, bucket, k []byte) (rec []byte, err error) {
	found, rec, err := seek(tx.Bucket(bucket).Cursor(), bucket, k)
	if err != nil || !bytes.Equal(found, k) {
		return nil, err
	}
	return rec, nil
}

// getEntry finds an entry; ok is false where there is none.
func getEntry(tx *bbolt.Tx, k []byte) (e entryRecord, ok bool, err error) {
	rec, err := lookup(tx, bucketConfig, k)
	if err != nil || rec == nil {
		return e, false, err
	}
	e, err = parseEntry(k, rec)
	return e, err == nil, err
}

func parseEntry(k, rec []byte) (e entryRecord, err error) {
	b, err := unseal(bucketConfig, k, rec)
	if err != nil {
		return e, err
	}
	if len(b) < 17 || len(b) < 17+int(b[16])*10 {
		return e, fmt.Errorf("state.db: entry %q: %w", k, errCorrupt)
	}
	e.rev, e.version = binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	n := int(b[16]) * 10
	e.places, e.json = b[17:17+n], b[17+n:]
	return e, nil
}

// nextPlaces returns the places that the event of version v stores and those that
// the entry then has, given the entry's places at version v-1.
func nextPlaces(old []byte, v uint64, here place) (event, entry []byte) {
	low := bits.TrailingZeros64(v)
	// Version v-2^i is none when it is 0, and then old has no i-th place.
	event = old[:min((low+1)*10, len(old))]
	entry = make([]byte, 0, bits.Len64(v)*10)
	for range low + 1 {
		entry = here.appendTo(entry)
	}
	if len(old) > len(entry) {
		entry = append(entry, old[len(entry):]...)
	}
	return event, entry
}

// errTrimmed says that the trail does not hold an event any more, as it is behind the cut.
var errTrimmed = errors.New("trimmed")

// findVersion returns the event that made version want of the entry's present
// life, which must be one of 1 to e.version; errTrimmed where it was trimmed.
func findVersion(tx *bbolt.Tx, e entryRecord, want uint64) (eventRecord, error) {
	version, places := e.version, e.places
	fromEntry := true
	for {
		best, at := uint64(0), place{}
		for i := len(places)/10 - 1; i >= 0; i-- {
			v := version - 1<<i
			if fromEntry {
				v = version >> i << i
			}
			if v >= want {
				best, at = v, placeAt(places[i*10:])
				break
			}
		}
		if best == 0 || at.rev == 0 {
			return eventRecord{}, errTrimmed
		}
		ev, err := namedEvent(tx, at)
		if err != nil {
			return ev, err
		}
		if best == want {
			return ev, nil
		}
		version, places, fromEntry = best, ev.places, false
	}
}

// A bell wakes everyone who waits for the store to move. It says that there is
// something new, not what: whoever wakes looks for himself.
type bell struct {
	mu sync.Mutex    // guards ch
	ch chan struct{} // nil while nobody waits
}

// wait returns a channel that is closed by the next ring. Take it before looking,
// so that nothing falls between the look and the wait.
func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

// ring wakes all who wait and waits for none.
func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
