package main

// What happens to files: somebody writes into the trail, or a bit falls over. The layout of
// state.db is restated here by hand.

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// sealed puts the CRC-32C of key and rest in front of rest.
func sealed(key, rest []byte) []byte {
	table := crc32.MakeTable(crc32.Castagnoli)
	return append(binary.BigEndian.AppendUint32(nil, crc32.Update(crc32.Checksum(key, table), table, rest)), rest...)
}

// tamper changes the value that an event tells of, in a stopped node's state.db, and makes its
// checksum right. With rehash it makes right all hashes from there on, too, as somebody would who
// knows the format.
//
// A record of the trail is crc[4] place[10] k[1] place[10]*k event[], the newest event's hash is
// in meta as crc[4] hash[32].
func tamper(tb testing.TB, n *node, id string, rehash bool) {
	tb.Helper()
	db, err := bbolt.Open(filepath.Join(n.data, "state.db"), 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		tb.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		trail := tx.Bucket([]byte("trail"))
		changed := map[string][]byte{}
		var keys []string
		last := strings.Repeat("0", 64)
		err := trail.ForEach(func(k, v []byte) error {
			head := 4 + 10 + 1 + 10*int(v[14])
			text := string(v[head:])
			body, rest, ok := strings.Cut(text, `,"hash":"`)
			if !ok {
				return fmt.Errorf("event without a hash: %s", text)
			}
			hash := rest[:64]
			if strings.HasPrefix(text, `{"id":"`+id+`",`) {
				body = strings.Replace(body, `"newValue":"`, `"newValue":"not `, 1)
			} else if len(keys) == 0 || !rehash {
				last = hash
				return nil
			}
			if rehash {
				sum := sha256.Sum256([]byte(last + "\n" + body + "}"))
				hash = hex.EncodeToString(sum[:])
			}
			last = hash
			keys = append(keys, string(k))
			changed[string(k)] = sealed(k, append(bytes.Clone(v[4:head]), body+`,"hash":"`+hash+`"}`...))
			return nil
		})
		if err != nil {
			return err
		}
		if len(keys) == 0 {
			return fmt.Errorf("no event %s", id)
		}
		for _, k := range keys {
			if err := trail.Put([]byte(k), changed[k]); err != nil {
				return err
			}
		}
		sum, err := hex.DecodeString(last)
		if err != nil {
			return err
		}
		return tx.Bucket([]byte("meta")).Put([]byte("hash"), sealed([]byte("hash"), sum))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		tb.Fatalf("state.db of %s: %v", n.id, err)
	}
}

// TestTampered: who changes the trail of one node is found out: by /api/v1/verify, at the next
// start, or by the other nodes.
func TestTampered(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	c.expects = []string{"another node's trail differs"}
	for i := range 20 {
		c.nodes[0].put(t, "app", fmt.Sprintf("k%d", i), "x")
	}
	var patch []string // more events than the tail that each start checks
	for i := range 1200 {
		patch = append(patch, fmt.Sprintf(`"p%d":"y"`, i))
	}
	if a := c.nodes[0].write(t, "PATCH", "/api/v1/config/app", "{"+strings.Join(patch, ",")+"}"); a.status != http.StatusOK {
		t.Fatal(a)
	}
	verify(c)
	n := c.followers()[0]
	n.stop()
	path := filepath.Join(n.data, "state.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	restore := func() {
		t.Helper()
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	tamper(t, n, "5-0", false)
	n.start()
	c.ready()
	if v := n.verify(t); v.OK || v.Event != "5-0" || v.Events != 4 || v.Last != "4-0" {
		t.Errorf("the value in event 5-0 was changed, verify says %+v", v)
	}
	if v := c.leader().verify(t); !v.OK || v.Events != 1220 || v.First != "1-0" || v.Last != "21-1199" {
		t.Errorf("a whole trail: verify says %+v", v)
	}
	n.stop()

	restore()
	tamper(t, n, "21-1100", false)
	n.start()
	names(t, n.fails(t, 10*time.Second), path, "21-1100", "; ")

	restore()
	tamper(t, n, "5-0", true)
	n.start()
	names(t, n.fails(t, limit(15*time.Second)), "trail", "differs", "start again")
	if err := os.RemoveAll(n.data); err != nil { // as it says
		t.Fatal(err)
	}
	n.start()
	c.ready()
	verify(c)
}

// TestDamagedLog changes a byte in raft's own file, where nothing but the node's own checksums can
// find it: the node refuses to start, in one line.
func TestDamagedLog(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	was := n.put(t, "app", "k", "a value in the log")
	n.stop()
	path := filepath.Join(n.data, "raft.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct{ bucket, key, old, new string }{
		{"logs", "", "a value in the log", "a value in tha log"}, // the entry's data
		{"conf", "CurrentTerm", "\x00\x00\x00\x02", "\x00\x00\x00\x03"},
	} {
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		found := false
		err = db.Update(func(tx *bbolt.Tx) error {
			b := tx.Bucket([]byte(m.bucket))
			return b.ForEach(func(k, v []byte) error {
				if m.key != "" && string(k) != m.key || !bytes.Contains(v, []byte(m.old)) {
					return nil
				}
				found = true
				return b.Put(bytes.Clone(k), bytes.Replace(v, []byte(m.old), []byte(m.new), 1))
			})
		})
		if err := errors.Join(err, db.Close()); err != nil || !found {
			t.Fatalf("%s of raft.db: %v, found %v", m.bucket, err, found)
		}
		n.start()
		names(t, n.fails(t, 10*time.Second), path, "checksum", "; ")
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	c.ready()
	if got := n.get(t, "app", "k"); got != was {
		t.Errorf("with the right bytes again %+v, want %+v", got, was)
	}
}

// TestDamageRead: a read that meets a damaged record tells its client nothing of it, and ends the
// node with what is damaged and what to do.
func TestDamageRead(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	err := w.st.db.Update(func(tx *bbolt.Tx) error {
		for bucket, key := range map[string]string{"config": "app\x00k", "trail": "\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00"} {
			b := tx.Bucket([]byte(bucket))
			rec := bytes.Clone(b.Get([]byte(key)))
			rec[len(rec)-3] ^= 1
			if err := b.Put([]byte(key), rec); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		name, path, accept string
		status             int // 0 where an answer has begun before the record is met
	}{
		{"get", keyPath("app", "k") + "?stale", "", http.StatusInternalServerError},
		{"list", "/api/v1/config/app?stale", "", http.StatusInternalServerError},
		{"trail", "/api/v1/audit/app?stale", "", http.StatusInternalServerError},
		{"stream", "/api/v1/audit/app?stale&since=0", "text/event-stream", 0},
	} {
		t.Run(m.name, func(t *testing.T) {
			s := newReader(t, w)
			s.node.failed = make(chan error, 1)
			ts := httptest.NewServer(s)
			defer ts.Close()
			a, err := do("GET", ts.URL+m.path, adminKey, "", "Accept", m.accept)
			switch {
			case m.status == 0 && err == nil:
				t.Errorf("a client sees a whole answer: %v", a)
			case m.status == 0:
			case err != nil:
				t.Error(err)
			case a.status != m.status || a.slug() != "internal" || strings.Contains(string(a.body), "state.db") || strings.Contains(string(a.body), "checksum"):
				t.Errorf("%v, want %d internal that says nothing of the cause", a, m.status)
			}
			select {
			case err := <-s.node.failed:
				names(t, err.Error(), "state.db", "checksum", "; ")
			case <-time.After(limit(5 * time.Second)):
				t.Error("the node goes on")
			}
		})
	}
}

// A truth is what a healthy node shows: all that a damaged one may show.
type truth struct {
	entries map[string]string // by path
	list    []string
	trail   []string
}

// serves says whether the node answers at all. One that hangs while it starts has its ports
// already, and every request to it would wait in vain.
func (n *node) serves() bool {
	quick := &http.Client{Transport: transport, Timeout: time.Second}
	a, err := doWith(quick, "GET", n.url+"/health", "", "")
	return err == nil && a.status == http.StatusOK
}

// tell reads all of a namespace from n. A request that is not answered with 200 is left out, and
// counted; a 404 is an answer.
func tell(n *node, ns string, keys []string) (told truth, failed int) {
	told.entries = map[string]string{}
	if !n.serves() {
		return told, 1
	}
	var mu sync.Mutex // guards told.entries and failed
	var readers sync.WaitGroup
	work := make(chan string)
	for range 4 {
		readers.Go(func() {
			for path := range work {
				a, err := do("GET", n.url+path+"?stale", adminKey, "")
				mu.Lock()
				switch {
				case err == nil && a.status == http.StatusOK:
					told.entries[path] = strings.TrimSpace(string(a.body))
				case err == nil && a.status == http.StatusNotFound:
					told.entries[path] = "404"
				default:
					failed++
				}
				mu.Unlock()
			}
		})
	}
	for _, k := range keys {
		work <- keyPath(ns, k)
	}
	close(work)
	readers.Wait()
	for _, l := range []struct {
		path string
		into *[]string
	}{{"/api/v1/config/" + ns, &told.list}, {"/api/v1/audit/" + ns, &told.trail}} {
		for query := (url.Values{"limit": {"1000"}, "stale": {""}}); ; {
			a, err := do("GET", n.url+l.path+"?"+query.Encode(), adminKey, "")
			if err == nil && a.status == http.StatusNotFound {
				*l.into = append(*l.into, "404")
				break
			}
			var page struct {
				Items      []json.RawMessage
				Pagination struct{ NextCursor *string }
			}
			if err != nil || a.status != http.StatusOK || json.Unmarshal(a.body, &page) != nil {
				failed++
				break
			}
			for _, item := range page.Items {
				*l.into = append(*l.into, string(item))
			}
			if page.Pagination.NextCursor == nil {
				*l.into = append(*l.into, "end")
				break
			}
			query.Set("cursor", *page.Pagination.NextCursor)
		}
	}
	return told, failed
}

// lies returns the first thing in told that is not so.
func (want truth) lies(told truth) string {
	for path, got := range told.entries {
		if got != want.entries[path] {
			return fmt.Sprintf("GET %s: %.300s, want %.300s", path, got, want.entries[path])
		}
	}
	for _, l := range []struct {
		name      string
		got, want []string
	}{{"list", told.list, want.list}, {"trail", told.trail, want.trail}} {
		for i, got := range l.got {
			if i >= len(l.want) || got != l.want[i] {
				return fmt.Sprintf("%s, item %d of %d: %.300s", l.name, i, len(l.want), got)
			}
		}
	}
	return ""
}

// flip turns one bit of a file over, in a page that is not all zeros.
func flip(tb testing.TB, r *rand.Rand, path string) string {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	for {
		at := r.IntN(len(b))
		page := b[at&^4095 : min(at&^4095+4096, len(b))]
		if bytes.Count(page, []byte{0}) == len(page) {
			continue
		}
		bit := r.IntN(8)
		b[at] ^= 1 << bit
		if err := os.WriteFile(path, b, 0o600); err != nil {
			tb.Fatal(err)
		}
		return fmt.Sprintf("bit %d of byte %d (page %d, offset %d) of %s", bit, at, at/4096, at%4096, path)
	}
}

// moveSnapshot makes a snapshot's meta.json say that it goes eight entries further than it does.
func moveSnapshot(tb testing.TB, path string) {
	tb.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	var index int
	before, after, _ := strings.Cut(string(text), `"Index":`)
	if _, err := fmt.Sscanf(after, "%d", &index); err != nil {
		tb.Fatalf("%v in %s", err, text)
	}
	after = strings.TrimPrefix(after, fmt.Sprint(index))
	if err := os.WriteFile(path, fmt.Appendf(nil, "%s\"Index\":%d%s", before, index+8, after), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// TestBitFlips turns single bits of a stopped node's files over and starts it. Whatever it does,
// refuse, stop or heal, it never shows anything that is not so.
func TestBitFlips(t *testing.T) {
	long(t)
	r := seeded(t)
	c := startCluster(t, 3)
	leader := c.leader()
	const keys = 1000
	n, few, writes := c.followers()[0], newFleet(t, leader.api, 3), 0
	drive := func(ops int) {
		few.drive(t, ops, func() func(int) []byte {
			put := newPut()
			return func(op int) []byte { return put.with(op%keys, writes+op) }
		})
		writes += ops
	}
	for installed(t, n) == 0 { // few clients make many entries, of which snapshots are made
		drive(2000)
	}
	drive(1000) // behind the snapshot
	c.converge()
	var names []string
	for i := range keys {
		names = append(names, fmt.Sprintf("k%0*d", numberWidth, i))
	}
	want, failed := tell(leader, "bench", names)
	if failed > 0 || len(want.entries) != keys || len(want.trail) != writes+1 {
		t.Fatalf("%d entries and %d events, %d failed", len(want.entries), len(want.trail), failed)
	}
	n.stop()
	pristine := filepath.Join(c.dir, "pristine")
	copyDir := func(from, to string) {
		t.Helper()
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
	}
	copyDir(n.data, pristine)
	log := n.log
	// An event never changes: whatever a node shows as its newest, at any moment, is one of these.
	known := map[string]bool{}
	for _, ev := range want.trail {
		known[ev] = true
	}
	peek := func() (lie string) {
		a, err := do("GET", n.url+"/api/v1/audit/bench?limit=1&stale", adminKey, "")
		var page struct{ Items []json.RawMessage }
		if err == nil && a.status == http.StatusOK && json.Unmarshal(a.body, &page) == nil && len(page.Items) > 0 && !known[string(page.Items[0])] {
			return string(page.Items[0])
		}
		return ""
	}

	outcomes := map[string]int{}
	for _, file := range []string{"raft.db", "state.db", "snapshots/*/state.bin", "snapshots/*/meta.json", "state.mark"} {
		for round := range 11 {
			targeted := round == 10 // once more, where a snapshot says how far it goes
			if targeted && file != "snapshots/*/meta.json" {
				break
			}
			n.log = filepath.Join(c.dir, fmt.Sprintf("flip-%s-%d.log", filepath.Base(file), round))
			copyDir(pristine, n.data)
			rebuild := (round%2 == 1 || targeted) && file != "state.mark" && file != "state.db"
			if rebuild { // so that snapshot and log are read
				if err := os.WriteFile(filepath.Join(n.data, "state.mark"), []byte("boot of another machine\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			paths, err := filepath.Glob(filepath.Join(n.data, file))
			if err != nil || len(paths) == 0 {
				t.Fatalf("%s: %v", file, err)
			}
			where := "Index of the snapshot, 8 more"
			if targeted {
				moveSnapshot(t, paths[len(paths)-1])
			} else {
				where = flip(t, r, paths[len(paths)-1])
			}
			n.start()
			outcome, lie := "", ""
			for deadline := time.Now().Add(20 * time.Second); outcome == ""; time.Sleep(5 * time.Millisecond) { // the pace of the question
				if !n.running() {
					outcome = "refused to start"
				} else if n.serves() && n.ready() == nil {
					outcome = "served"
				} else if time.Now().After(deadline) {
					outcome = "not ready"
				}
				if lie == "" && n.serves() {
					lie = peek()
				}
			}
			if lie != "" {
				t.Errorf("%s (rebuild %v): before it was ready it showed an event that never was: %.600s", where, rebuild, lie)
			}
			told, failed := tell(n, "bench", names) // also of one that is not ready
			if lie := want.lies(told); lie != "" {
				t.Errorf("%s (rebuild %v): %s", where, rebuild, lie)
			}
			if outcome == "not ready" {
				t.Errorf("%s (rebuild %v): neither ended nor ready after 20 s", where, rebuild)
			}
			if outcome == "served" {
				// New writes must be able to follow, or else the node stops.
				e := leader.put(t, "after", "k", fmt.Sprintf("%s-%d", file, round))
				until(t, 15*time.Second, func() error {
					if at, err := revision(n); n.running() && (err != nil || at < e.Revision) {
						return fmt.Errorf("%s: revision %d of %d, %v", where, at, e.Revision, err)
					}
					return nil
				})
				if n.running() && n.get(t, "after", "k") != e {
					t.Errorf("%s: a later write is not there", where)
				}
				switch {
				case !n.running():
					outcome = "stopped"
				case failed > 0:
					outcome = "failed to answer and runs on"
				case n.verify(t).OK:
					outcome = "served all, right"
				default:
					outcome = "verify finds it"
				}
			}
			n.kill()
			text := n.logged()
			if strings.Contains(text, "panic:") || strings.Contains(text, "fatal error:") {
				at := max(strings.Index(text, "panic:"), strings.Index(text, "fatal error:"))
				t.Errorf("%s: the log holds a panic: %.600s", where, text[at:])
				outcome += ", by a panic"
			}
			reason := ""
			if i := strings.LastIndex(text, "confman: "); i >= 0 {
				reason = strings.TrimSpace(text[i:])
			}
			t.Logf("%s, rebuild %v: %s. %s", strings.TrimPrefix(where, c.dir), rebuild, outcome, reason)
			outcomes[file+": "+outcome]++
		}
	}
	for o, times := range outcomes {
		t.Logf("%2d %s", times, o)
	}
	n.log = log
	copyDir(pristine, n.data)
	n.start()
	c.ready()
	verify(c)
}

// TestEntryUsedAgain: who reads one entry of the log after another into the same place changes
// none that the cache holds.
func TestEntryUsedAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs, err := openRaftLog(filepath.Join(dir, "raft.db"), newDisk(dir, 1, slog.New(slog.DiscardHandler), func(err error) { t.Error(err) }))
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	cache, err := raft.NewLogCache(64, logs)
	if err != nil {
		t.Fatal(err)
	}
	data := func(index uint64) string { return fmt.Sprintf("entry %03d", index) }
	for i := uint64(1); i <= 100; i++ {
		if err := cache.StoreLog(&raft.Log{Index: i, Term: 1, Type: raft.LogCommand, Data: []byte(data(i))}); err != nil {
			t.Fatal(err)
		}
	}
	used := new(raft.Log)
	for i := uint64(100); i > 0; i-- {
		if err := cache.GetLog(i, used); err != nil {
			t.Fatal(err)
		}
	}
	for i := uint64(1); i <= 100; i++ {
		e := new(raft.Log)
		if err := cache.GetLog(i, e); err != nil || string(e.Data) != data(i) || string(e.Extensions) != string(entrySum(e)) {
			t.Errorf("entry %d is %q, sum %x (%v)", i, e.Data, e.Extensions, err)
		}
	}
}

// TestDamagedPages flips one bit in what no record's checksum covers as such: in a key, by which bbolt
// finds its way, so that it is in the wrong place and others may not be found because of it; or in what a
// leaf page says of its records. Nothing is shown as missing: each answer is the right one, or none.
func TestDamagedPages(t *testing.T) {
	t.Parallel()
	r := seeded(t)
	w := newWriter(t, t.TempDir())
	for i := range 300 {
		w.apply(set([]string{"app", "bpp", "cpp"}[i%3], fmt.Sprintf("k%03d", i/2), strings.Repeat(fmt.Sprint(i), 40)))
	}
	paths := []string{"/api/v1/config/app?limit=10000&", "/api/v1/config/cpp?limit=60&", "/api/v1/namespaces?", "/api/v1/namespaces/bpp/keys?", "/api/v1/namespaces/bpp?",
		"/api/v1/audit/app?limit=1000&", "/api/v1/audit/cpp?limit=30&", "/api/v1/audit?limit=1000&", "/api/v1/audit?limit=20&since=270&", "/api/v1/verify?", "/api/v1/verify?from=100&to=200&",
		keyPath("bpp", "k400") + "?", "/api/v1/namespaces/nobody?"}
	for i := 0; i < 150; i += 9 {
		paths = append(paths, keyPath([]string{"app", "bpp", "cpp"}[i*2%3], fmt.Sprintf("k%03d", i))+"?")
	}
	ask := func(st *store) (said []string) {
		s := newReader(t, &writer{st: st})
		s.node.failed = make(chan error, 1)
		for _, path := range paths {
			req, rec := httptest.NewRequest("GET", path+"stale", nil), httptest.NewRecorder()
			req.Header.Set("X-API-Key", adminKey)
			s.ServeHTTP(rec, req)
			body := rec.Body.String()
			if rec.Code == http.StatusNotFound {
				body = "" // it has an id of its own
			}
			said = append(said, fmt.Sprint(rec.Code, " ", body))
		}
		return said
	}
	truth := ask(w.st)
	file, err := os.ReadFile(w.st.db.Path())
	if err != nil {
		t.Fatal(err)
	}
	var keys [][]byte // with some of what follows, which makes each one of a kind
	err = w.st.view(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketConfig, bucketNamespaces, bucketTrail} {
			if err := tx.Bucket(name).ForEach(func(k, rec []byte) error {
				keys = append(keys, slices.Concat(k, rec[:min(len(rec), 20)]))
				if name[0] == bucketNamespaces[0] {
					keys = append(keys, keys[len(keys)-1], keys[len(keys)-1]) // there are few
				}
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	refused, silent, wrong := 0, 0, 0
	dir := t.TempDir()
	leafs := 0
	for page := 2; page < len(file)/4096; page++ {
		head := file[page*4096:]
		if binary.LittleEndian.Uint16(head[8:]) == 2 && binary.LittleEndian.Uint64(head) == uint64(page) {
			leafs++
		}
	}
	if leafs < 20 {
		t.Fatalf("the file has %d leaf pages of 4096 bytes", leafs)
	}
	for round := range rounds(400, 5000) {
		of := keys[r.IntN(len(keys))]
		length := 10
		if bytes.Contains(of, []byte("pp")) {
			length = bytes.Index(of, []byte("pp")) + 2
		}
		bad := bytes.Clone(of)
		bit := r.IntN(8 * length)
		bad[bit/8] ^= 1 << (bit % 8)
		damaged := bytes.ReplaceAll(file, of, bad)
		for round%2 == 0 {
			damaged = bytes.Clone(file)
			page := 2 + r.IntN(len(file)/4096-2)
			head := damaged[page*4096:]
			count := int(binary.LittleEndian.Uint16(head[10:]))
			if binary.LittleEndian.Uint16(head[8:]) != 2 || binary.LittleEndian.Uint64(head) != uint64(page) || count == 0 || count > 200 {
				continue
			}
			at := 10 + r.IntN(6+16*count) // the count, and where each record is and how long
			head[at] ^= 1 << r.IntN(8)
			of, bad = nil, fmt.Appendf(nil, "byte %d of leaf page %d", at, page)
			break
		}
		if err := os.WriteFile(filepath.Join(dir, "state.db"), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := openDB(filepath.Join(dir, "state.db"))
		if err != nil {
			refused++
			continue
		}
		st := &store{dir: dir, db: db}
		err = st.load()
		if err == nil && round%4 != 1 { // where one key was damaged, what reads it has to do without
			err = viewed(db, checkEntries)
		}
		if err != nil {
			refused++
			db.Close()
			continue
		}
		heard := false
		for i, said := range ask(st) {
			switch {
			case said == truth[i]:
			case strings.HasPrefix(said, "500 "), strings.HasPrefix(said, `200 {"ok":false`):
				heard = true
			default:
				wrong++
				t.Errorf("%q became %q: %s says %.200s, want %.200s", of, bad, paths[i], said, truth[i])
			}
		}
		if !heard {
			silent++
		}
		db.Close()
		if wrong > 20 {
			t.FailNow()
		}
	}
	t.Logf("refused to start %d times; %d times nobody met it", refused, silent)
}
