package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

// lockDir takes the data directory for this process until it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("data directory %s is in use by another process", dir)
		}
		return nil, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return f, nil
}

// rejoinEmpty is the next step for a node whose log or snapshots cannot be trusted any more.
const rejoinEmpty = "if the other nodes have the data, move this node's data directory away and start again: it rejoins empty"

// rebuildState is the next step for a node whose state file cannot be trusted any more.
const rebuildState = "remove state.db and start again: it is rebuilt from raft's snapshot and log"

// checkDisk is the next step after an error of the disk.
const checkDisk = "check the disk and the space on it, then start the node again"

// A disk is what a node knows of the file system under its data directory.
type disk struct {
	dir   string
	floor uint64 // bytes that must stay free, Storage.MinFreeMiB
	halt  func(error)
	log   *slog.Logger

	// As look last saw it:
	free      atomic.Uint64 // bytes free, allFree where the system cannot say
	state     atomic.Uint64 // bytes of the state file
	raft      atomic.Uint64 // bytes of raft's log
	snapshots atomic.Uint64 // bytes of all snapshots
	newest    atomic.Uint64 // bytes of the newest snapshot
	taken     atomic.Int64  // when that was written, nanoseconds since 1970; 0 where there is none

	mu   sync.Mutex // guards busy and next
	busy map[uint64]*stall
	next uint64
}

// A stall is a store call that has not returned yet.
type stall struct {
	what  string
	ticks int
}

const (
	diskTick = 500 * time.Millisecond
	// stallTicks of the watchdog are how long one store call may take: 10 s. It counts its own
	// ticks rather than the clock, so that a process that was paused does not end when it wakes.
	stallTicks = 20
)

func newDisk(dir string, floor uint64, log *slog.Logger, halt func(error)) *disk {
	d := &disk{dir: dir, floor: floor, log: log, halt: halt, busy: map[uint64]*stall{}}
	d.look()
	return d
}

// allFree is what is free where the system cannot say.
const allFree = 1 << 62

// look reads how large the files are, and last, because refusals follow from it, how much is free.
func (d *disk) look() {
	for name, size := range map[string]*atomic.Uint64{"state.db": &d.state, "raft.db": &d.raft} {
		if info, err := os.Stat(filepath.Join(d.dir, name)); err == nil {
			size.Store(uint64(info.Size()))
		}
	}
	d.lookAtSnapshots()
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		d.free.Store(allFree)
		return
	}
	d.free.Store(st.Bavail * uint64(st.Bsize))
}

// lookAtSnapshots is part of look. What it cannot read it passes over: a snapshot may go meanwhile.
func (d *disk) lookAtSnapshots() {
	var all, newest, taken int64
	at := filepath.Join(d.dir, "snapshots")
	dirs, _ := os.ReadDir(at)
	for _, dir := range dirs {
		files, _ := os.ReadDir(filepath.Join(at, dir.Name()))
		for _, f := range files {
			info, err := f.Info()
			if err != nil {
				continue
			}
			all += info.Size()
			if when := info.ModTime().UnixNano(); f.Name() == "state.bin" && !strings.HasSuffix(dir.Name(), ".tmp") && when > taken {
				newest, taken = info.Size(), when
			}
		}
	}
	d.snapshots.Store(uint64(all))
	d.newest.Store(uint64(newest))
	d.taken.Store(taken)
}

// during brackets a store call: a leader whose disk hangs otherwise leads for ever, for
// its heartbeats need no disk. Call what it returns when the call is over.
func (d *disk) during(what string) (done func()) {
	_, done = d.watched(what)
	return done
}

// watched is during for a call that may find that it has more to do: allow gives it so much more time from
// then on.
func (d *disk) watched(what string) (allow func(time.Duration), done func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	id := d.next
	d.next++
	call := &stall{what: what}
	d.busy[id] = call
	allow = func(more time.Duration) {
		d.mu.Lock()
		defer d.mu.Unlock()
		call.ticks = -int(more / diskTick)
	}
	return allow, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.busy, id)
	}
}

// watch runs as long as the process: the node's last store calls are watched too.
func (d *disk) watch() error {
	go func() {
		for range time.Tick(diskTick) {
			d.mu.Lock()
			for _, s := range d.busy {
				if s.ticks++; s.ticks >= stallTicks {
					d.mu.Unlock()
					d.halt(fmt.Errorf("%s has hung for %v; %s", s.what, stallTicks*diskTick, checkDisk))
				}
			}
			d.mu.Unlock()
		}
	}()
	go func() {
		low := false
		for range time.Tick(2 * diskTick) {
			d.look() // beside the watchdog: on a hung disk it may hang too
			if d.lowForLeader() == low {
				continue
			}
			if low = !low; low {
				d.sayLow()
			} else {
				d.log.Info("disk has room for a leader again", "free", d.free.Load())
			}
		}
	}()
	return nil
}

// sayLow logs that lowForLeader holds.
func (d *disk) sayLow() {
	d.log.Error("disk is nearly full: a leader takes deletes only", "free", d.free.Load(), "minimum", d.leaderFloor())
}

// low reports that a follower must not take more.
func (d *disk) low() bool { return d.free.Load() < d.floor }

// lowForLeader reports that a leader must not take writes.
func (d *disk) lowForLeader() bool { return d.free.Load() < d.leaderFloor() }

// leaderFloor is how many bytes must be free on a leader: there must be room for a snapshot,
// too, and for what it is restored to.
func (d *disk) leaderFloor() uint64 { return max(d.floor, 2*d.state.Load()) }

// A raftLog is raft's log, term and vote on the disk. A failing disk ends the node: after
// one failed fsync nobody knows what is on it.
//
// Every entry carries a checksum of its index, term, type and data in Log.Extensions, and every
// value beside the log one behind it, for bbolt checks nothing but its meta pages. They are
// CRC-32C, big-endian.
type raftLog struct {
	*raftboltdb.BoltStore
	path string
	disk *disk
	// stored, if it is there, is called with each command before it is appended.
	stored func(*raft.Log)

	entries, bytes atomic.Int64 // appended since mark

	appending histogram // each with its fsync
}

func openRaftLog(path string, d *disk) (*raftLog, error) {
	var bolt *raftboltdb.BoltStore
	err := caught(func() (err error) {
		bolt, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{
			Timeout:      time.Second,
			FreelistType: bbolt.FreelistMapType,
			// The log is short, so the scan that an open then needs is too, and each append is
			// spared the list of the pages that truncation freed.
			NoFreelistSync:  true,
			NoStatistics:    true,
			InitialMmapSize: 4 << 30, // address space; see openDB
		}})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w; if the file is damaged, %s", path, err, rejoinEmpty)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	return &raftLog{BoltStore: bolt, path: path, disk: d}, nil
}

// caught runs f and returns its panic as an error: libraries panic on files that are damaged.
func caught(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a page that the disk does not give
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	return f()
}

// check ends the node where a write failed.
func (l *raftLog) check(op string, err error) error {
	if err != nil {
		l.disk.halt(fmt.Errorf("%s %s: %w; %s", op, l.path, err, checkDisk))
	}
	return err
}

func entrySum(e *raft.Log) []byte {
	var head [17]byte
	binary.BigEndian.PutUint64(head[:], e.Index)
	binary.BigEndian.PutUint64(head[8:], e.Term)
	head[16] = byte(e.Type)
	return binary.BigEndian.AppendUint32(nil, crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, e.Data))
}

// StoreLogs implements raft.LogStore. A follower stores the sums that the leader made, so
// what was damaged on the way is refused too.
func (l *raftLog) StoreLogs(logs []*raft.Log) error {
	size := 0
	for _, e := range logs {
		if e.Extensions == nil {
			e.Extensions = entrySum(e)
		} else if string(e.Extensions) != string(entrySum(e)) {
			return l.check("append to", fmt.Errorf("entry %d: %w", e.Index, errCorrupt))
		}
		size += len(e.Data)
		if l.stored != nil && e.Type == raft.LogCommand {
			l.stored(e)
		}
	}
	defer l.disk.during("append to " + l.path)()
	start := time.Now()
	if err := l.check("append to", l.BoltStore.StoreLogs(logs)); err != nil {
		return err
	}
	l.appending.observe(time.Since(start))
	l.add(int64(len(logs)), int64(size))
	return nil
}

// StoreLog implements raft.LogStore.
func (l *raftLog) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// GetLog implements raft.LogStore. It does not write into what e held: that may be shared with
// an entry of the cache, which the decoder would change.
func (l *raftLog) GetLog(index uint64, e *raft.Log) error {
	*e = raft.Log{}
	err := caught(func() error { return l.BoltStore.GetLog(index, e) })
	if err == nil && (e.Index != index || string(e.Extensions) != string(entrySum(e))) {
		err = fmt.Errorf("entry %d: %w", index, errCorrupt)
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		l.disk.halt(fmt.Errorf("read %s: %w; %s", l.path, err, rejoinEmpty))
	}
	return err
}

// DeleteRange implements raft.LogStore.
func (l *raftLog) DeleteRange(min, max uint64) error {
	defer l.disk.during("truncate " + l.path)()
	return l.check("truncate", l.BoltStore.DeleteRange(min, max))
}

// Set implements raft.StableStore.
func (l *raftLog) Set(k, v []byte) error {
	defer l.disk.during("write term or vote to " + l.path)()
	sealed := append(make([]byte, 0, len(v)+4), v...)
	sealed = binary.BigEndian.AppendUint32(sealed, crc32.Update(crc32.Checksum(k, castagnoli), castagnoli, v))
	return l.check("write term or vote to", l.BoltStore.Set(k, sealed))
}

// Get implements raft.StableStore.
func (l *raftLog) Get(k []byte) ([]byte, error) {
	v, err := l.BoltStore.Get(k)
	if err != nil {
		return nil, err
	}
	n := len(v) - 4
	if n < 0 || binary.BigEndian.Uint32(v[n:]) != crc32.Update(crc32.Checksum(k, castagnoli), castagnoli, v[:n]) {
		return nil, fmt.Errorf("read %s: %s: %w; %s", l.path, k, errCorrupt, rejoinEmpty)
	}
	return v[:n], nil
}

// SetUint64 implements raft.StableStore.
func (l *raftLog) SetUint64(k []byte, v uint64) error {
	return l.Set(k, binary.BigEndian.AppendUint64(nil, v))
}

// GetUint64 implements raft.StableStore.
func (l *raftLog) GetUint64(k []byte) (uint64, error) {
	v, err := l.Get(k)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("read %s: %s: %w", l.path, k, errCorrupt)
	}
	return binary.BigEndian.Uint64(v), nil
}

// mark begins counting anew.
func (l *raftLog) mark() { l.entries.Store(0); l.bytes.Store(0) }

// add counts what was appended before mark after all.
func (l *raftLog) add(entries, bytes int64) { l.entries.Add(entries); l.bytes.Add(bytes) }

// grown is what was appended since mark.
func (l *raftLog) grown() (entries, bytes int64) { return l.entries.Load(), l.bytes.Load() }

// A snapshotStore is raft's snapshot store with a checksum of each snapshot's meta.json, CRC-32C in
// hex, in the file meta.sum beside it: raft's own covers the state alone, and a wrong index
// would let it skip or repeat commands. A snapshot without meta.sum was not finished.
type snapshotStore struct {
	*raft.FileSnapshotStore
	dir  string
	halt func(error)
}

func openSnapshots(dir string, log hclog.Logger, halt func(error)) (*snapshotStore, error) {
	s, err := raft.NewFileSnapshotStoreWithLogger(dir, 2, log)
	if err != nil {
		return nil, fmt.Errorf("open %s/snapshots: %w", dir, err)
	}
	at := filepath.Join(dir, "snapshots")
	// One that was not finished goes: raft would count it among the two that it keeps.
	names, err := os.ReadDir(at)
	if err != nil {
		return nil, err
	}
	for _, d := range names {
		_, err := os.Stat(filepath.Join(at, d.Name(), "meta.sum"))
		if os.IsNotExist(err) || strings.HasSuffix(d.Name(), ".tmp") {
			log.Warn("removing a snapshot that was not finished", "name", d.Name())
			err = os.RemoveAll(filepath.Join(at, d.Name()))
		}
		if err != nil {
			return nil, err
		}
	}
	return &snapshotStore{s, at, halt}, nil
}

// Open implements raft.SnapshotStore. raft passes over a damaged one, or sends it again for ever.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, r, err := s.FileSnapshotStore.Open(id)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // reaped meanwhile
		s.halt(fmt.Errorf("read snapshot %s: %w; %s", filepath.Join(s.dir, id), err, rejoinEmpty))
	}
	return meta, r, err
}

func (s *snapshotStore) sum(id string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, id, "meta.json"))
	return fmt.Appendf(nil, "%08x\n", crc32.Checksum(b, castagnoli)), err
}

// List implements raft.SnapshotStore.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	metas, err := s.FileSnapshotStore.List()
	if err != nil {
		return nil, err
	}
	// raft passes over what it cannot read; here that is damage.
	dirs, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	finished := map[string]bool{}
	for _, d := range dirs {
		want, err := os.ReadFile(filepath.Join(s.dir, d.Name(), "meta.sum"))
		if os.IsNotExist(err) || strings.HasSuffix(d.Name(), ".tmp") {
			continue
		}
		got, rerr := s.sum(d.Name())
		if err = errors.Join(err, rerr); err == nil && string(got) != string(want) {
			err = errCorrupt
		}
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: meta.json: %w; %s", filepath.Join(s.dir, d.Name()), err, rejoinEmpty)
		}
		finished[d.Name()] = true
	}
	return slices.DeleteFunc(metas, func(m *raft.SnapshotMeta) bool { return !finished[m.ID] }), nil
}

// Create implements raft.SnapshotStore.
func (s *snapshotStore) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, t raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(v, index, term, c, cIndex, t)
	if err != nil {
		return nil, err
	}
	return &snapshotSink{sink, s}, nil
}

// A snapshotSink adds meta.sum when the snapshot is finished.
type snapshotSink struct {
	raft.SnapshotSink
	of *snapshotStore
}

// Close implements io.Closer.
func (s *snapshotSink) Close() error {
	if err := s.SnapshotSink.Close(); err != nil {
		return errors.Join(err, s.remove())
	}
	sum, err := s.of.sum(s.ID())
	if err == nil {
		err = writeFileSync(filepath.Join(s.of.dir, s.ID(), "meta.sum"), sum)
	}
	if err != nil {
		return errors.Join(err, s.remove())
	}
	return nil
}

// Cancel implements raft.SnapshotSink. raft's own leaves what a full disk did not take whole, and
// with it the disk full.
func (s *snapshotSink) Cancel() error { return errors.Join(s.SnapshotSink.Cancel(), s.remove()) }

// remove removes a snapshot that failed.
func (s *snapshotSink) remove() error {
	dir := filepath.Join(s.of.dir, s.ID())
	return errors.Join(os.RemoveAll(dir+".tmp"), os.RemoveAll(dir))
}
