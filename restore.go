package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/bits"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// A restore into a running cluster goes through the log in parts, since no command may be as large as a
// backup. Commands "stage" put the backup's entries and namespaces into a bucket of their own, where nobody
// sees them and which makes no revision; then one command "restore" makes them the state, in one
// transaction and one revision. What was staged by a restore that came to nothing is removed by the next
// one, by "unstage", or by the next leader.

// A restoring is what these commands carry.
type restoring struct {
	ID       string        `json:"id"`            // of the restore, random
	Part     uint64        `json:"part"`          // of stage: its number, from 0; of restore: how many there are
	Entries  []stagedEntry `json:"e,omitempty"`   // of stage
	Spaces   []stagedSpace `json:"ns,omitempty"`  // of stage
	Sum      string        `json:"sum,omitempty"` // of restore: the backup's SHA-256
	Revision uint64        `json:"rev,omitempty"` // of restore: the backup's
}

type stagedEntry struct {
	NS    string `json:"ns"`
	Key   string `json:"k"`
	Value string `json:"v"`
	Type  string `json:"t"`
}

type stagedSpace struct {
	NS   string `json:"ns"`
	Meta nsMeta `json:"m"`
}

// The bucket staging is there only while a restore is under way.
//
//	key          value
//	00           crc[4] next[8] id[]: the number of the next part, and the restore's id
//	65 ns 00 key crc[4] type and value, each a JSON string
//	6e ns        crc[4] JSON of nsMeta
var (
	bucketStaging = []byte("staging")
	stagedHow     = []byte{0}
)

const (
	stagedKey       = 'e'
	stagedNamespace = 'n'
	// stagedBytes is about how much a part has, but for one that holds a single large value. Other writes
	// wait for one part at most.
	stagedBytes = 256 << 10
)

// stagedSoFar says whose parts are staged and which comes next; "" where none are.
func stagedSoFar(tx *bbolt.Tx) (id string, next uint64, err error) {
	b := tx.Bucket(bucketStaging)
	if b == nil {
		return "", 0, nil
	}
	rec, err := unseal(bucketStaging, stagedHow, b.Get(stagedHow))
	if err != nil {
		return "", 0, err
	}
	return string(rec[8:]), binary.BigEndian.Uint64(rec), nil
}

// errStaging is the refusal of a command whose predecessors are not there any more.
var errStaging = errUnavailable.because("the restore was interrupted before it was decided, and nothing has changed; send the backup again")

// stage applies one part.
func (b *batch) stage(c *command) (*result, error) {
	p := c.Restore
	id, next, err := stagedSoFar(b.tx)
	if err != nil {
		return nil, err
	}
	if p.Part == 0 {
		if err := b.unstage(); err != nil {
			return nil, err
		}
	} else if id != p.ID || next != p.Part {
		return &result{err: errStaging}, nil
	}
	st, err := b.tx.CreateBucketIfNotExists(bucketStaging)
	if err != nil {
		return nil, err
	}
	st.FillPercent = 0.95 // parts come in the order of the keys
	put := func(k, rec []byte) error { return st.Put(k, seal(k, rec)) }
	for _, e := range p.Entries {
		rec := appendString(make([]byte, 4, 40+len(e.Value)), e.Type)
		err = errors.Join(err, put(append([]byte{stagedKey}, entryKey(e.NS, e.Key)...), appendString(append(rec, ','), e.Value)))
	}
	for _, s := range p.Spaces {
		rec, jerr := json.Marshal(s.Meta)
		err = errors.Join(err, jerr, put(append([]byte{stagedNamespace}, s.NS...), append(make([]byte, 4), rec...)))
	}
	how := append(binary.BigEndian.AppendUint64(make([]byte, 4), p.Part+1), p.ID...)
	return &result{rev: b.pos.rev}, errors.Join(err, put(stagedHow, how))
}

// unstage removes what is staged.
func (b *batch) unstage() error {
	if b.tx.Bucket(bucketStaging) == nil {
		return nil
	}
	return b.tx.DeleteBucket(bucketStaging)
}

// restoreTime is how long a transaction may take that goes through all of a state file of size bytes:
// ample, for a node that is ended in the middle is ended again at its next start.
func restoreTime(size int64) time.Duration { return time.Duration(size>>21) * time.Second }

// restore makes the state what is staged. An entry that is there alike stays as it is.
func (b *batch) restore(c *command) (*result, error) {
	p := c.Restore
	id, next, err := stagedSoFar(b.tx)
	if err != nil {
		return nil, err
	}
	if id != p.ID || next != p.Part {
		return &result{err: errStaging}, nil
	}
	if b.allow != nil {
		b.allow(restoreTime(b.tx.Size()))
	}
	// What earlier commands of this transaction have changed is in the buckets from here on.
	if err := b.writeNamespaces(); err != nil {
		return nil, err
	}
	changes, err := b.differences()
	if err != nil {
		return nil, err
	}
	spaces, err := b.spaceDifferences()
	if err != nil {
		return nil, err
	}
	res := &result{rev: b.pos.rev, changed: len(changes)}
	if len(changes) == 0 && len(spaces) == 0 {
		return res, b.unstage()
	}

	now := b.next(c)
	res.rev = b.pos.rev
	keys := map[string]int{} // how many more a namespace has
	touched := map[string]bool{}
	for _, ch := range changes {
		ns, _, _ := bytes.Cut(ch.key, []byte{0})
		touched[string(ns)] = true
		if !ch.staged {
			keys[string(ns)]--
			if err := b.config.Delete(ch.key); err != nil {
				return nil, err
			}
			continue
		}
		if ch.version == 0 {
			keys[string(ns)]++
		}
		if err := b.putRestored(ch, now, c.Actor); err != nil {
			return nil, err
		}
	}
	for ns := range touched {
		if spaces[ns] == nil {
			if spaces[ns], err = getNamespace(b.tx, ns); err != nil {
				return nil, err
			}
		}
	}
	for _, ns := range slices.Sorted(maps.Keys(spaces)) {
		n := spaces[ns]
		n.rev = b.pos.rev
		n.keys += uint64(keys[ns])
		if err := n.put(b.tx, ns); err != nil {
			return nil, err
		}
	}
	if err := b.unstage(); err != nil {
		return nil, err
	}
	b.everything = true
	said := fmt.Sprintf(`{"sha256":%q,"revision":%d,"changed":%d}`, p.Sum, p.Revision, len(changes))
	return res, b.restoreEvent(c, now, said)
}

// A restored is a difference between the state and what is staged.
type restored struct {
	key     []byte // in bucket config
	staged  bool   // it is in the backup
	version uint64 // of what is there, 0 for nothing
}

// differences compares the entries, in the order of their keys.
func (b *batch) differences() (changes []restored, err error) {
	cur, st := b.config.Cursor(), b.tx.Bucket(bucketStaging).Cursor()
	k, rec := cur.First()
	sk, srec := st.Seek([]byte{stagedKey})
	for {
		if sk != nil && sk[0] != stagedKey {
			sk = nil
		}
		way := 0
		switch {
		case k == nil && sk == nil:
			return changes, nil
		case sk == nil:
			way = -1
		case k == nil:
			way = 1
		default:
			way = bytes.Compare(k, sk[1:])
		}
		var version uint64
		if way <= 0 {
			e, err := parseEntry(k, rec)
			if err != nil {
				return nil, err
			}
			version = e.version
			if way == 0 {
				typ, value, err := stagedValue(sk, srec)
				if err != nil {
					return nil, err
				}
				// An entry begins with its names, value and type, in one form only.
				ns, key, _ := bytes.Cut(k, []byte{0})
				want := entry{Namespace: string(ns), Key: string(key), Value: value, Type: typ}
				text := want.appendTo(nil)
				if bytes.HasPrefix(e.json, text[:bytes.LastIndex(text, []byte(`,"version":`))+len(`,"version":`)]) {
					version = 0 // alike
				}
			}
		}
		if way != 0 || version != 0 {
			at := k
			if way > 0 {
				at = sk[1:]
			}
			changes = append(changes, restored{bytes.Clone(at), way >= 0, version})
		}
		if way <= 0 {
			k, rec = cur.Next()
		}
		if way >= 0 {
			sk, srec = st.Next()
		}
	}
}

// stagedValue reads a staged entry.
func stagedValue(k, rec []byte) (typ, value string, err error) {
	text, err := unseal(bucketStaging, k, rec)
	if err != nil {
		return "", "", err
	}
	var both [2]string
	err = json.Unmarshal(slices.Concat([]byte("["), text, []byte("]")), &both)
	return both[0], both[1], err
}

// putRestored writes an entry as the backup has it. The trail has no event of its own for it, so neither it
// nor an earlier version is found by its number once it is not the newest.
func (b *batch) putRestored(ch restored, now, actor string) error {
	k := append([]byte{stagedKey}, ch.key...)
	typ, value, err := stagedValue(k, b.tx.Bucket(bucketStaging).Get(k))
	if err != nil {
		return err
	}
	ns, key, _ := bytes.Cut(ch.key, []byte{0})
	e := entry{Namespace: string(ns), Key: string(key), Value: value, Type: typ,
		Version: ch.version + 1, Revision: b.pos.rev, UpdatedAt: now, UpdatedBy: actor}
	rec, _ := e.record(ch.key, make([]byte, bits.Len64(e.Version)*10)) // places of none
	return b.config.Put(ch.key, rec)
}

// spaceDifferences compares the namespaces; what it returns is to be written, by name.
func (b *batch) spaceDifferences() (map[string]*namespace, error) {
	differ, there := map[string]*namespace{}, b.tx.Bucket(bucketStaging)
	err := b.tx.Bucket(bucketNamespaces).ForEach(func(k, rec []byte) error {
		n, err := parseNamespace(k, rec)
		if err != nil || n.deleted || there.Get(append([]byte{stagedNamespace}, k...)) != nil {
			return err
		}
		n.deleted = true
		differ[string(k)] = n
		return nil
	})
	if err != nil {
		return nil, err
	}
	cur := there.Cursor()
	for k, rec := cur.Seek([]byte{stagedNamespace}); k != nil && k[0] == stagedNamespace; k, rec = cur.Next() {
		text, err := unseal(bucketStaging, k, rec)
		if err != nil {
			return nil, err
		}
		var meta nsMeta
		if err := json.Unmarshal(text, &meta); err != nil {
			return nil, err
		}
		ns := string(k[1:])
		n, err := getNamespace(b.tx, ns)
		if err != nil {
			return nil, err
		}
		if n == nil {
			n = &namespace{deleted: true}
		}
		if n.deleted || n.nsMeta != meta {
			n.deleted, n.nsMeta = false, meta
			differ[ns] = n
		}
	}
	return differ, nil
}

// restoreEvent writes the event of a restore in the revision that next has begun, and notes its place.
func (b *batch) restoreEvent(c *command, now, said string) error {
	if err := b.storeEvent(c, now, actionRestore, "", nil, &said); err != nil {
		return err
	}
	places, err := restorePlaces(b.tx)
	if err != nil {
		return err
	}
	rec := make([]byte, 4)
	for _, p := range append(places, place{b.pos.rev, 0}) {
		rec = p.appendTo(rec)
	}
	return b.tx.Bucket(bucketMeta).Put(metaRestores, seal(metaRestores, rec))
}

// actionRestore is the action of the event that says that the state became a backup's. It is of no
// namespace, and shown with each one's.
const actionRestore = "store.restore"

var metaRestores = []byte("restores")

// restorePlaces are the places of all such events that there were, oldest first.
func restorePlaces(tx *bbolt.Tx) (places []place, err error) {
	rec := tx.Bucket(bucketMeta).Get(metaRestores)
	if rec == nil {
		return nil, nil
	}
	if rec, err = unseal(bucketMeta, metaRestores, rec); err != nil {
		return nil, err
	}
	for at := range slices.Chunk(rec, 10) {
		places = append(places, placeAt(at))
	}
	return places, nil
}

// lastRestore is the place of the newest of them before or at p that the trail has still; the zero place if
// there is none.
func lastRestore(tx *bbolt.Tx, p place) (place, error) {
	places, err := restorePlaces(tx)
	if err != nil {
		return place{}, err
	}
	c, err := storedCut(tx)
	for _, at := range slices.Backward(places) {
		if !p.before(at) && !c.covers(at) {
			return at, err
		}
	}
	return place{}, err
}

// inGap reports whether no event has revision rev because a cluster that was made from a backup has left
// it out. Who names it has it from the cluster before, in which it may have been another change.
func inGap(tx *bbolt.Tx, rev uint64) (bool, error) {
	if c, err := storedCut(tx); err != nil || c.at.rev >= rev {
		return false, err // resume decides
	}
	from := place{rev, 0}.appendTo(nil)
	k, rec, err := seek(tx.Bucket(bucketTrail).Cursor(), bucketTrail, from)
	if err != nil || k == nil || rev == 0 || placeAt(k).rev == rev {
		return false, err
	}
	ev, err := parseEvent(k, rec)
	return err == nil && jumps(ev.json), err
}

// spools reports whether the body of the request goes to the disk, however large it is.
func (c *call) spools() bool { return c.route.method == "PUT" && c.route.pattern == "/api/v1/backup" }

// bodyReader reads a request's body and gives its client bodyTime for each piece.
type bodyReader struct{ c *call }

// Read implements io.Reader.
func (b bodyReader) Read(p []byte) (int, error) {
	if b.c.s.stopping.Load() != serving {
		return 0, errUnavailable.because("this node is shutting down; try again, here or on another node")
	}
	http.NewResponseController(b.c.w).SetReadDeadline(time.Now().Add(bodyTime))
	n, err := b.c.r.Body.Read(p)
	if err != nil && err != io.EOF {
		err = errBadRequest.because("the body did not arrive whole: %v", err)
	}
	return n, err
}

// putBackup makes entries and namespaces those of a backup.
func (s *server) putBackup(c *call) error {
	if c.r.Header["Content-Encoding"] != nil {
		return errUnsupportedMediaType.because("Content-Encoding is not supported; send the backup as it is")
	}
	if cond, err := conditionOf(c.r); err != nil || cond.given() {
		return cmp.Or(err, errBadRequest.because("a restore takes no conditions; leave If-Match and If-None-Match out"))
	}
	if !s.restoring.CompareAndSwap(false, true) {
		return errConflict.because("another restore is under way; wait for its end")
	}
	defer s.restoring.Store(false)
	c.waited = true
	head, sp, db, err := readBackup(bodyReader{c}, func(size int64) (*spool, error) {
		return newSpool(s.node.dir, size, s.node.disk.leaderFloor())
	})
	if err != nil {
		return err
	}
	defer sp.f.Close()
	defer db.Close()
	c.sent = []byte{} // nothing is left of the body
	http.NewResponseController(c.w).SetReadDeadline(time.Time{})

	r := &restoring{ID: rand.Text()}
	err = viewed(db, func(tx *bbolt.Tx) error { return r.inParts(tx, func() error { return s.sendPart(c, r) }) })
	if err == nil {
		err = c.stillAllowed()
	}
	if err != nil {
		s.node.unstage(r.ID)
		return err
	}
	r.Entries, r.Spaces, r.Sum, r.Revision = nil, nil, fmt.Sprintf("%x", head.sum), head.revision
	size := int64(s.node.disk.state.Load())
	res, err := s.proposeUntil(c, &command{Op: "restore", Restore: r}, time.Now().Add(s.cfg.requestTimeout()+restoreTime(size)))
	if err != nil {
		if problemOf(err).kind != errUnknown {
			s.node.unstage(r.ID)
		}
		return err
	}
	return c.sendJSON(http.StatusOK, fmt.Appendf(nil, `{"revision":%d,"changed":%d}`, res.rev, res.changed))
}

// sendPart proposes a part of a restore. Whatever becomes of it, the restore is not made.
func (s *server) sendPart(c *call, r *restoring) error {
	switch err := c.r.Context().Err(); {
	case s.stopping.Load() != serving:
		return errUnavailable.because("this node is shutting down; send the backup again, here or to another node")
	case err != nil:
		return errClosed.because("%v", err)
	}
	part := *r // a command that was given up may be read still
	_, err := s.proposeUntil(c, &command{Op: "stage", Restore: &part}, time.Now().Add(s.cfg.requestTimeout()))
	if errors.Is(err, errUnknown) {
		err = &problem{kind: errUnavailable, cause: err,
			detail: "no majority took a part of the backup in time; nothing has changed, send it again"}
	}
	return err
}

// inParts sends the entries and namespaces that tx sees, part by part: r is the part when send is called,
// and in the end says how many there were.
func (r *restoring) inParts(tx *bbolt.Tx, send func() error) error {
	size := 0
	flush := func() error {
		err := send()
		r.Part++
		r.Entries, r.Spaces, size = nil, nil, 0
		return err
	}
	err := tx.Bucket(bucketConfig).ForEach(func(k, rec []byte) error {
		p, err := parseEntry(k, rec)
		if err != nil {
			return err
		}
		e, err := p.decode()
		if err != nil {
			return err
		}
		if size += len(rec); size > stagedBytes && len(r.Entries) > 0 {
			if err := flush(); err != nil {
				return err
			}
			size = len(rec)
		}
		r.Entries = append(r.Entries, stagedEntry{e.Namespace, e.Key, e.Value, e.Type})
		return nil
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketNamespaces).ForEach(func(k, rec []byte) error {
		n, err := parseNamespace(k, rec)
		if err != nil || n.deleted {
			return err
		}
		if size += len(rec); size > stagedBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		r.Spaces = append(r.Spaces, stagedSpace{string(k), n.nsMeta})
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// unstage removes, as the leader, what the restore id has staged.
func (n *raftNode) unstage(id string) {
	c := &command{Op: "unstage", Restore: &restoring{ID: id}}
	if _, err := n.propose(c, time.Now().Add(n.cfg.requestTimeout())); err != nil {
		n.log.Warn("what a restore has staged is not removed; the next leader or restore does it", "error", err)
	}
}

// unstageOthers removes what restores at earlier leaders have staged.
func (n *raftNode) unstageOthers() error {
	var id string
	err := n.store.view(func(tx *bbolt.Tx) (err error) {
		id, _, err = stagedSoFar(tx)
		return err
	})
	if err == nil && id != "" {
		n.unstage(id)
	}
	return nil // a damaged record is met again where it matters
}

// restoreGap is how far above a backup's revision the cluster begins that -restore makes of it. No write
// that the cluster before made after the backup has a number as high, so no old ETag or event id matches.
const restoreGap = 1_000_000_000

// unfinished is the name of the file that is in a data directory while -restore makes it.
const unfinished = "restoring"

// checkFinished refuses a directory that -restore has begun and not finished.
func checkFinished(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, unfinished)); !os.IsNotExist(err) {
		return cmp.Or(err, fmt.Errorf("a restore into %s did not come to its end: run confman -restore again", dir))
	}
	return nil
}

// restoreNew makes the data directory of a new cluster's first node from the backup that cfg names.
func restoreNew(cfg *config, stdout io.Writer) error {
	in, err := os.Open(cfg.restore)
	if err != nil {
		return err
	}
	defer in.Close()
	dir := filepath.Join(cfg.Storage.DataPath, cfg.Cluster.NodeId)
	if err := makeDir(dir); err != nil {
		return err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := clearRestore(dir); err != nil {
		return err
	}
	head, sp, db, err := readBackup(in, func(size int64) (*spool, error) {
		// The pages as they come, as they are written anew, and as a snapshot.
		return newSpool(dir, size, uint64(cfg.Storage.MinFreeMiB)<<20+2*uint64(size))
	})
	if err != nil {
		return restoreError(cfg.restore, err)
	}
	defer sp.f.Close()
	defer db.Close()
	if err := writeFileSync(filepath.Join(dir, unfinished), nil); err != nil {
		return err
	}
	c := &command{Actor: "confman -restore", ID: rand.Text(), At: time.Now().UnixNano()}
	pos, counts, err := writeRestored(cfg, dir, db, head, c)
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, unfinished)); err != nil {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "restored %s: revision %d, %d keys, %d events, into %s; the new cluster begins at revision %d, hash %x\n"+
		"Start this node alone and wait until it is ready. Then start the others of Cluster.Nodes with empty directories.\n",
		cfg.restore, head.revision, counts[0], counts[1], dir, pos.rev, pos.hash)
	return err
}

// restoreError is an error about a backup, as it stands on standard error.
func restoreError(path string, err error) error {
	var p *problem
	if errors.As(err, &p) {
		return fmt.Errorf("%s: %s", path, p.detail)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// clearRestore refuses a directory that holds anything, and removes what a restore into it that did not
// come to its end has left.
func clearRestore(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	_, serr := os.Stat(filepath.Join(dir, unfinished))
	for _, f := range names {
		switch name := f.Name(); name {
		case "lock", "admin.key", spoolName, unfinished, unfinished + ".tmp": // not data
		case "raft.db", "snapshots", "identity", "identity.tmp", "formed", "formed.tmp", "state.db.restore":
			if serr == nil {
				if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
					return err
				}
				continue
			}
			fallthrough
		default:
			return fmt.Errorf("%s is not empty: it holds %s; a backup is restored into a new directory", dir, name)
		}
	}
	return nil
}

// writeRestored writes the files of a node that alone has a vote and holds what db does, in a snapshot:
// state.db is made from it. Everything is on the disk when it returns. counts are those of keys and events.
func writeRestored(cfg *config, dir string, db *bbolt.DB, head backupHeader, c *command) (pos *position, counts [2]int, err error) {
	// What is written anew has no page in it of which nothing is known.
	path := filepath.Join(dir, "state.db.restore")
	fresh, err := openDB(path)
	if err != nil {
		return nil, counts, err
	}
	defer os.Remove(path)
	defer fresh.Close()
	err = viewed(db, func(tx *bbolt.Tx) error {
		for i, name := range [][]byte{bucketConfig, bucketTrail, bucketNamespaces, bucketMeta} {
			n, err := copyBucket(fresh, tx.Bucket(name), name)
			if err != nil {
				return err
			}
			if i < len(counts) {
				counts[i] = n
			}
		}
		return nil
	})
	if err != nil {
		return nil, counts, err
	}
	if pos, err = readPosition(fresh); err != nil {
		return nil, counts, err
	}
	counts[1] = int(pos.events) // some may have been trimmed, and not swept
	// Of the snapshot. Nodes of the cluster before, or of another that was made from a backup, never have an
	// entry of this index and term, so raft takes no log of theirs for the beginning of this one's.
	index, term := uint64(restoreGap), restoreGap+mathrand.N[uint64](restoreGap)
	err = fresh.Update(func(tx *bbolt.Tx) error {
		b := &batch{pos: *pos, namespaces: map[string]*namespace{}}
		b.open(tx)
		b.pos.index = index
		b.pos.rev += restoreGap - 1
		now := b.next(c)
		said := fmt.Sprintf(`{"sha256":"%x","revision":%d}`, head.sum, head.revision)
		if err := b.restoreEvent(c, now, said); err != nil {
			return err
		}
		*pos = b.pos
		return b.finish()
	})
	if err != nil {
		return nil, counts, err
	}

	disk := newDisk(dir, 0, cfg.logger(), func(error) {}) // its errors come back too
	logs, err := openRaftLog(filepath.Join(dir, "raft.db"), disk)
	if err != nil {
		return nil, counts, err
	}
	err = logs.SetUint64([]byte("CurrentTerm"), term)
	if err = errors.Join(err, logs.Close()); err != nil {
		return nil, counts, err
	}
	snaps, err := openSnapshots(dir, hclog.NewNullLogger(), func(error) {})
	if err != nil {
		return nil, counts, err
	}
	id := cfg.Cluster.NodeId
	members := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(id), Address: raft.ServerAddress(id)}}}
	_, trans := raft.NewInmemTransport(raft.ServerAddress(id))
	sink, err := snaps.Create(raft.SnapshotVersionMax, index, term, members, index, trans)
	if err != nil {
		return nil, counts, err
	}
	err = fresh.View(func(tx *bbolt.Tx) error {
		_, err := tx.WriteTo(sink)
		return err
	})
	if err != nil {
		return nil, counts, errors.Join(err, sink.Cancel())
	}
	if err := sink.Close(); err != nil {
		return nil, counts, err
	}
	n := &raftNode{dir: dir}
	if err := n.readIdentity(false); err != nil {
		return nil, counts, err
	}
	if err := n.becomeUsed(map[string]uint64{}); err != nil {
		return nil, counts, err
	}
	if err := n.markUsed(); err != nil {
		return nil, counts, err
	}
	return pos, counts, syncDir(dir)
}

// copyBucket copies a bucket of records to another file, some in a transaction.
func copyBucket(to *bbolt.DB, from *bbolt.Bucket, name []byte) (n int, err error) {
	const some = 10_000
	cur := from.Cursor()
	k, v := cur.First()
	for more := true; more; {
		err := to.Update(func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists(name)
			if err != nil {
				return err
			}
			b.FillPercent = 0.95
			for i := 0; k != nil && i < some; i++ {
				if err := b.Put(k, v); err != nil {
					return err
				}
				n++
				k, v = cur.Next()
			}
			more = k != nil
			return nil
		})
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
