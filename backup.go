package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// A backup is one line of text and the state file behind it, page for page, as one transaction saw it:
//
//	confman-backup 1 revision=N hash=HEX size=BYTES sha256=HEX LF
//
// and then as many bytes as size says, and no more. 1 is the version of this form. revision is the
// store's and hash that of its newest event, 64 zeros where there is none; sha256 is of the bytes behind
// the line. What the state file holds is described at store. For example, cut where the dots are:
//
//	confman-backup 1 revision=258 hash=5dc2…7f01 size=65536 sha256=90ae…c4d2
//	00 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00 ed da 0c ed 02 00 00 00 00 10 00 00 …
//
// where the second line is the first of bbolt's two meta pages: page 0, flags 4, bbolt's magic number,
// its version 2, and pages of 0x1000 bytes.
type backupHeader struct {
	revision uint64
	hash     [32]byte
	size     int64
	sum      [sha256.Size]byte
}

const backupFormat = 1

func (h *backupHeader) line() string {
	return fmt.Sprintf("confman-backup %d revision=%d hash=%x size=%d sha256=%x\n", backupFormat, h.revision, h.hash, h.size, h.sum)
}

// parseBackupHeader reads the line, with its line feed. What is written in another way than line writes it
// is refused.
func parseBackupHeader(line string) (h backupHeader, err error) {
	version, _, _ := strings.Cut(strings.TrimPrefix(line, "confman-backup "), " ")
	v, err := strconv.ParseUint(version, 10, 32)
	if err != nil || !strings.HasPrefix(line, "confman-backup ") {
		return h, errInvalidValue.because("this is not a backup: it does not begin with a line confman-backup")
	}
	if v != backupFormat {
		return h, errInvalidValue.because("the backup has format %d, and this confman reads %d: use the one that wrote it, or a newer one", v, backupFormat)
	}
	var hash, sum []byte
	fmt.Sscanf(line, "confman-backup 1 revision=%d hash=%x size=%d sha256=%x\n", &h.revision, &hash, &h.size, &sum)
	copy(h.hash[:], hash)
	copy(h.sum[:], sum)
	if h.line() != line || h.size < 0 || h.revision > 1<<62 { // what begins above it must have numbers left
		return h, errInvalidValue.because("the first line of the backup is damaged")
	}
	return h, nil
}

// backupLine is how long the first line may be.
const backupLine = 300

const (
	// spoolChunk is how much of a spool may wait to be written to the disk. More would be in the way of
	// the log's fsyncs.
	spoolChunk = 1 << 20
	// backupRate is how fast a backup copies the state, in bytes a second: fast enough that the
	// transaction is short, slow enough that writes go on beside it.
	backupRate = 64 << 20
	// maxBackups is how many backups a node sends at once.
	maxBackups = 4
)

// A spool is a file that has no name any more, so that it ends with the process, in the data directory. It
// keeps the disk's floor free and gives what is written to the disk piece by piece.
type spool struct {
	f    *os.File
	n    int64
	sum  hash.Hash    // of what is written
	rate int64        // bytes a second; 0 for as fast as it goes
	stop func() error // asked now and then; an error ends the writing

	began  time.Time
	synced int64
}

// spoolName is what a spool is called for a moment.
const spoolName = "spool.tmp"

// spools is held while a spool takes its room, so that no two are given the same, nor the same name.
var spools sync.Mutex

// newSpool makes a spool of size bytes in dir. The error is errNoSpace where less than floor would be
// left, then without a file.
func newSpool(dir string, size int64, floor uint64) (*spool, error) {
	spools.Lock()
	defer spools.Unlock()
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err == nil && (size < 0 || st.Bavail*uint64(st.Bsize) < floor+uint64(size)) {
		return nil, errNoSpace.because("the disk of this node has no room for %d bytes beside what must stay free: free some space, or use another node", size)
	}
	path := filepath.Join(dir, spoolName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err = os.Remove(path); err == nil && size > 0 {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = nil // then the room may be gone before it is used, and writing says so
		}
	}
	if err != nil {
		f.Close()
		return nil, noRoom(err)
	}
	return &spool{f: f, sum: sha256.New(), began: time.Now()}, nil
}

// noRoom makes of a full disk what a client is told.
func noRoom(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &problem{kind: errNoSpace, detail: "the disk of this node is full: free some space, or use another node", cause: err}
	}
	return err
}

// Write implements io.Writer.
func (s *spool) Write(b []byte) (int, error) {
	n, err := s.f.Write(b)
	s.n += int64(n)
	s.sum.Write(b[:n])
	if err == nil && s.n-s.synced >= spoolChunk {
		// Advice, not a promise: nobody needs the spool after a crash.
		unix.SyncFileRange(int(s.f.Fd()), s.synced, s.n-s.synced, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		s.synced = s.n
		if s.stop != nil {
			if err := s.stop(); err != nil {
				return n, err
			}
		}
		if s.rate > 0 {
			time.Sleep(time.Until(s.began.Add(time.Duration(s.n) * time.Second / time.Duration(s.rate)))) // the rate
		}
	}
	return n, noRoom(err)
}

// getBackup sends the state of one revision. It is copied first: a client may take hours, and a
// transaction as long would keep every page that is freed meanwhile from being used again.
func (s *server) getBackup(c *call) error {
	select {
	case s.backups <- struct{}{}:
	default:
		return errTooMany.because("this node sends %d backups already; try again, or use another node", maxBackups)
	}
	defer func() { <-s.backups }()
	if err := s.fresh(c); err != nil {
		return err
	}
	c.waited = true
	h := c.w.Header()
	disposition := func(rev uint64) {
		c.sawRevision(rev)
		h["Content-Type"] = []string{"application/octet-stream"}
		h["Content-Disposition"] = []string{fmt.Sprintf(`attachment; filename="confman-%d.backup"`, rev)}
		h["Cache-Control"] = []string{"no-store"}
	}
	if c.r.Method == http.MethodHead {
		disposition(s.store.at().rev)
		return c.sendNothing(http.StatusOK)
	}
	// ended says why nobody needs the backup any more.
	ended := func() error {
		select {
		case <-s.ending:
			return errUnavailable.because("this node is shutting down; use another node")
		case <-c.r.Context().Done():
			return errClosed.because("the client went away")
		default:
			return c.stillAllowed()
		}
	}
	var head backupHeader
	var sp *spool
	err := s.store.view(func(tx *bbolt.Tx) (err error) {
		// How old the answer is is said of the moment that it shows; to copy it takes longer than some
		// reads may be old.
		if err := c.showStaleness(); err != nil {
			return err
		}
		c.reads = false
		floor := s.node.disk.floor
		if s.node.leads() {
			floor = s.node.disk.leaderFloor() // a spool stops no writes
		}
		if sp, err = newSpool(s.node.dir, tx.Size(), floor); err != nil {
			return err
		}
		sp.rate, sp.stop = backupRate, ended
		head, err = writeBackup(tx, sp)
		return err
	})
	if sp != nil {
		defer sp.f.Close()
	}
	if err != nil {
		return err
	}
	disposition(head.revision)
	line := head.line()
	h["Content-Length"] = []string{strconv.FormatInt(int64(len(line))+head.size, 10)}
	h["Connection"] = []string{"close"} // its buffers are small from here on
	if conn, ok := c.r.Context().Value(connKey{}).(*guest); ok {
		conn.SetWriteBuffer(backupBuffer)
	}
	c.w.WriteHeader(http.StatusOK)
	if err := c.write([]byte(line)); err != nil {
		return err
	}
	rc := http.NewResponseController(c.w)
	b := make([]byte, backupBuffer/2)
	for at := int64(0); at < head.size; {
		n, err := sp.f.ReadAt(b[:min(int64(len(b)), head.size-at)], at)
		if err != nil {
			return err
		}
		if err := ended(); err != nil {
			return err
		}
		rc.SetWriteDeadline(time.Now().Add(writeTime))
		if err := c.write(b[:n]); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// backupBuffer is how many bytes the kernel may hold for a client that takes a backup, half of what it is
// handed at once. With as much as the kernel would take, a slow client that does take something would
// look for minutes as if it took nothing.
const backupBuffer = 128 << 10

// connKey is the key, in a request's context, of the connection that it came on.
type connKey struct{}

// writeBackup copies the state that tx sees to sp, checked, and returns what the first line says of it.
func writeBackup(tx *bbolt.Tx, sp *spool) (h backupHeader, err error) {
	if err := checkRecords(tx); err != nil {
		return h, err
	}
	pos, err := positionOf(tx)
	if err != nil {
		return h, err
	}
	if h.size, err = tx.WriteTo(sp); err != nil {
		return h, err
	}
	h.revision, h.hash = pos.rev, pos.hash
	sp.sum.Sum(h.sum[:0])
	return h, nil
}

// readBackup copies the pages of a backup to a spool, which makeSpool makes of the size that the backup
// says, and checks all that can be known of it. The database has those pages: close it before the spool. An
// error is errInvalidValue where the backup is to blame.
func readBackup(r io.Reader, makeSpool func(size int64) (*spool, error)) (h backupHeader, sp *spool, db *bbolt.DB, err error) {
	br := bufio.NewReaderSize(r, 64<<10)
	line, err := br.ReadSlice('\n')
	if err != nil && err != io.EOF && err != bufio.ErrBufferFull {
		return h, nil, nil, err
	}
	if len(line) > backupLine {
		line = line[:backupLine]
	}
	if h, err = parseBackupHeader(string(line)); err != nil {
		return h, nil, nil, err
	}
	if sp, err = makeSpool(h.size); err != nil {
		return h, nil, nil, err
	}
	defer func() {
		if err != nil {
			if db != nil {
				db.Close()
			}
			sp.f.Close()
		}
	}()
	if n, err := io.CopyN(sp, br, h.size); err == io.EOF {
		return h, sp, nil, errInvalidValue.because("the backup ends behind %d of %d bytes", n, h.size)
	} else if err != nil {
		return h, sp, nil, err
	}
	if _, err := br.ReadByte(); err == nil {
		return h, sp, nil, errInvalidValue.because("the backup goes on behind the %d bytes that its first line promises", h.size)
	} else if err != io.EOF {
		return h, sp, nil, err
	}
	if got := [sha256.Size]byte(sp.sum.Sum(nil)); got != h.sum {
		return h, sp, nil, errInvalidValue.because("the backup is damaged: its bytes have the SHA-256 %x, its first line says %x", got, h.sum)
	}
	if db, err = openBackup(sp.f, h); err != nil {
		return h, sp, nil, errInvalidValue.because("the backup is damaged, though its SHA-256 fits: %s", flat(err))
	}
	return h, sp, db, nil
}

// openBackup opens the pages of a backup, read-only, and checks them.
func openBackup(f *os.File, h backupHeader) (db *bbolt.DB, err error) {
	if err := checkPages(f, h.size); err != nil {
		return nil, err
	}
	err = caught(func() (err error) {
		db, err = bbolt.Open(f.Name(), 0o600, &bbolt.Options{ReadOnly: true, NoStatistics: true, Timeout: time.Second,
			OpenFile: func(string, int, os.FileMode) (*os.File, error) {
				fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // the file has no name
				return os.NewFile(uintptr(fd), f.Name()), err
			}})
		return err
	})
	if err != nil {
		return nil, err
	}
	pos, err := readPosition(db)
	if err == nil && (pos.rev != h.revision || pos.hash != h.hash) {
		err = fmt.Errorf("it is of revision %d, hash %x, and its first line says another", pos.rev, pos.hash)
	}
	for _, check := range []func(*bbolt.Tx) error{checkRecords, checkEntries, checkForms, checkChain} {
		if err == nil {
			err = viewed(db, check)
		}
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// checkForms checks that every entry and namespace is one that this program could have written. What is
// larger would be in one command of the log, and one that is too large to be replicated in time stops the
// cluster for good.
func checkForms(tx *bbolt.Tx) error {
	rev := storedRevision(tx)
	err := tx.Bucket(bucketConfig).ForEach(func(k, rec []byte) error {
		r, err := parseEntry(k, rec)
		if err != nil {
			return err
		}
		e, err := r.decode()
		if err != nil {
			return err
		}
		ns, key, _ := bytes.Cut(k, []byte{0})
		switch {
		case e.Namespace != string(ns) || e.Key != string(key) || !validNamespace(e.Namespace):
			err = errors.New("it is at another place than it says")
		case e.Revision != r.rev || e.Version != r.version || r.rev > rev || r.version == 0:
			err = errors.New("its revision or version cannot be")
		case !bytes.Equal(e.appendTo(nil), r.json):
			err = errors.New("it is not in the form in which it is stored")
		case len(e.Value) > maxValue:
			err = fmt.Errorf("its value has %d bytes; at most %d can be", len(e.Value), maxValue)
		default:
			err = cmp.Or(checkKey(e.Key), checkValue(e.Value, e.Type))
		}
		if err != nil {
			return fmt.Errorf("entry %.200q: %w", k, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketNamespaces).ForEach(func(k, rec []byte) error {
		n, err := parseNamespace(k, rec)
		switch {
		case err != nil:
		case !validNamespace(string(k)) || len(n.Description)+len(n.Owner) > maxMeta || n.rev > rev || n.deleted && n.keys > 0 ||
			!isStamp(n.CreatedAt):
			err = errors.New("its name, metadata or revision cannot be")
		default:
			if !bytes.Equal(n.record(string(k)), rec) {
				err = errors.New("it is not in the form in which it is stored")
			}
		}
		if err != nil {
			return fmt.Errorf("namespace %.200q: %w", k, err)
		}
		return nil
	})
}

// checkChain checks the whole trail, from the cut on: the hashes, and that no event is missing.
func checkChain(tx *bbolt.Tx) error {
	c, err := storedCut(tx)
	if err != nil {
		return err
	}
	at, hash := c.at, c.hash
	err = tx.Bucket(bucketTrail).ForEach(func(k, rec []byte) error {
		if len(k) != 10 {
			return fmt.Errorf("event %x: %w", k, errCorrupt)
		}
		ev, err := parseEvent(k, rec)
		if err != nil {
			return err
		}
		here := placeAt(k)
		if c.covers(here) {
			return nil
		}
		if !at.leadsTo(here, jumps(ev.json)) || !follows(ev.json, here, hash) {
			return fmt.Errorf("event %d-%d does not follow the one before it: %w", here.rev, here.n, errCorrupt)
		}
		at, hash = here, hashOf(ev.json)
		return nil
	})
	if err != nil {
		return err
	}
	if rev := storedRevision(tx); at.rev != rev {
		return fmt.Errorf("the trail ends at revision %d, the store is at %d: %w", at.rev, rev, errCorrupt)
	}
	return nil
}

// checkPages checks that the tree of pages in a state file is one: bbolt checks only its meta pages, and
// what is no tree makes it panic, read beyond the file or walk for ever. Anybody's bytes may be in f.
func checkPages(f *os.File, size int64) error {
	const least, most = 512, 64 << 10 // bytes of a page
	if size < 2*least {
		return errors.New("it is too short for a state file")
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(data)
	return caught(func() error {
		p := &pages{data: data}
		meta := data[pageHead:]
		p.size = uint64(order.Uint32(meta[8:]))
		if p.size < least || p.size > most || p.size&(p.size-1) != 0 || uint64(size)%p.size != 0 || uint64(size) < 2*p.size {
			return fmt.Errorf("it has pages of %d bytes", p.size)
		}
		// A backup's two meta pages say the same, so it does not matter which one bbolt takes.
		other := data[p.size+pageHead:]
		if !bytes.Equal(meta[:48], other[:48]) {
			return errors.New("its two meta pages differ")
		}
		if n := order.Uint64(meta[40:]); n != uint64(size)/p.size {
			return fmt.Errorf("it has %d pages, and says %d", uint64(size)/p.size, n)
		}
		p.seen = make([]bool, uint64(size)/p.size)
		p.seen[0], p.seen[1] = true, true
		return p.walk(order.Uint64(meta[16:]), nil, nil, 0, true)
	})
}

// order is that of bbolt's pages: the machine's.
var order = binary.NativeEndian

const (
	pageHead   = 16 // id[8] flags[2] count[2] overflow[4]
	pageItem   = 16 // of a leaf: flags[4] pos[4] ksize[4] vsize[4]; of a branch: pos[4] ksize[4] page[8]
	pageBranch = 1  // flags
	pageLeaf   = 2
	maxLevels  = 32 // of a tree; bbolt's have two keys on a page at least
)

// pages are those of a state file that is checked.
type pages struct {
	data []byte
	size uint64 // of a page
	seen []bool // each is in the tree once
}

// walk checks the tree below page id, whose keys are from low on and before high; nil is no bound. The
// root is that of the file, whose values are buckets.
func (p *pages) walk(id uint64, low, high []byte, depth int, root bool) error {
	if id >= uint64(len(p.seen)) || depth > maxLevels {
		return fmt.Errorf("page %d is not there, or too deep", id)
	}
	head := p.data[id*p.size:]
	over := uint64(order.Uint32(head[12:]))
	if order.Uint64(head) != id || over >= uint64(len(p.seen))-id {
		return fmt.Errorf("page %d is another, or has no end", id)
	}
	for i := id; i <= id+over; i++ {
		if p.seen[i] {
			return fmt.Errorf("page %d is used twice", i)
		}
		p.seen[i] = true
	}
	return p.check(id, p.data[id*p.size:(id+over+1)*p.size], low, high, depth, root)
}

// check checks one page and what is below it.
func (p *pages) check(id uint64, b, low, high []byte, depth int, root bool) error {
	bad := fmt.Errorf("page %d is damaged", id)
	if len(b) < pageHead {
		return bad
	}
	flags, count := order.Uint16(b[8:]), int(order.Uint16(b[10:]))
	if flags != pageBranch && flags != pageLeaf || pageHead+count*pageItem > len(b) || flags == pageBranch && count == 0 {
		return bad
	}
	// keyAt is the key of an item, and what follows it there.
	keyAt := func(i int) (key, rest []byte) {
		item := b[pageHead+i*pageItem:]
		pos, size := uint64(order.Uint32(item)), uint64(order.Uint32(item[4:]))
		if flags == pageLeaf {
			pos, size = uint64(order.Uint32(item[4:])), uint64(order.Uint32(item[8:]))
		}
		if size == 0 || size > bbolt.MaxKeySize || pos < uint64((count-i)*pageItem) || pos+size > uint64(len(item)) {
			return nil, nil
		}
		return item[pos : pos+size], item[pos+size:]
	}
	last := low
	for i := range count {
		key, rest := keyAt(i)
		if key == nil || last != nil && bytes.Compare(key, last) < 0 || i > 0 && bytes.Equal(key, last) || high != nil && bytes.Compare(key, high) >= 0 {
			return bad
		}
		last = key
		item := b[pageHead+i*pageItem:]
		if flags == pageBranch {
			end := high
			if i+1 < count {
				if end, _ = keyAt(i + 1); end == nil {
					return bad
				}
			}
			if err := p.walk(order.Uint64(item[8:]), key, end, depth+1, root); err != nil {
				return err
			}
			continue
		}
		bucket, size := order.Uint32(item), uint64(order.Uint32(item[12:]))
		if size > uint64(len(rest)) || root != (bucket == 1) || bucket > 1 || root && size < 16 {
			return bad
		}
		if !root {
			continue
		}
		// A bucket: root[8] sequence[8], and its only page where root is 0.
		var err error
		if sub := order.Uint64(rest); sub != 0 {
			err = p.walk(sub, nil, nil, depth+1, false)
		} else if inline := rest[16:size]; len(inline) < pageHead || order.Uint16(inline[8:]) != pageLeaf {
			err = bad
		} else {
			err = p.check(id, inline, nil, nil, depth+1, false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
