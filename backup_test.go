package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// backupOf makes a backup of a store, as it is sent.
func backupOf(tb testing.TB, st *store) []byte {
	tb.Helper()
	var head backupHeader
	var pages []byte
	err := st.view(func(tx *bbolt.Tx) error {
		sp, err := newSpool(st.dir, tx.Size(), 0)
		if err != nil {
			return err
		}
		defer sp.f.Close()
		if head, err = writeBackup(tx, sp); err != nil {
			return err
		}
		pages, err = io.ReadAll(io.NewSectionReader(sp.f, 0, 1<<40))
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return append([]byte(head.line()), pages...)
}

// readBytes reads a backup as a node does and closes it again.
func readBytes(tb testing.TB, b []byte, use func(tx *bbolt.Tx) error) error {
	tb.Helper()
	_, sp, db, err := readBackup(bytes.NewReader(b), func(size int64) (*spool, error) { return newSpool(tb.TempDir(), size, 0) })
	if err != nil {
		return err
	}
	defer sp.f.Close()
	defer db.Close()
	return viewed(db, use)
}

// restoreCommands are the commands by which a backup is restored; the last one decides.
func restoreCommands(tb testing.TB, b []byte, id string) (cmds []*command) {
	tb.Helper()
	r := &restoring{ID: id}
	add := func(op string) error {
		part := *r
		cmds = append(cmds, &command{Op: op, Restore: &part, Actor: "restorer@test", Source: "::1", ID: "id-" + id})
		return nil
	}
	err := readBytes(tb, b, func(tx *bbolt.Tx) error { return r.inParts(tx, func() error { return add("stage") }) })
	if err != nil {
		tb.Fatal(err)
	}
	r.Sum, r.Revision = "sum-"+id, 7
	add("restore")
	return cmds
}

// A model is what a state holds, but for how it came to be.
type model struct {
	entries map[string][2]string // value and type, by key of bucket config
	spaces  map[string]nsMeta
}

func modelOf(tb testing.TB, view func(func(*bbolt.Tx) error) error) model {
	tb.Helper()
	m := model{map[string][2]string{}, map[string]nsMeta{}}
	err := view(func(tx *bbolt.Tx) error {
		for k, e := range recordsOf(tb, tx) {
			m.entries[k] = [2]string{e.Value, e.Type}
		}
		return tx.Bucket(bucketNamespaces).ForEach(func(k, rec []byte) error {
			n, err := parseNamespace(k, rec)
			if err == nil && !n.deleted {
				m.spaces[string(k)] = n.nsMeta
			}
			return err
		})
	})
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// recordsOf are the entries of a state by their keys.
func recordsOf(tb testing.TB, tx *bbolt.Tx) map[string]entry {
	tb.Helper()
	all := map[string]entry{}
	err := tx.Bucket(bucketConfig).ForEach(func(k, rec []byte) error {
		r, err := parseEntry(k, rec)
		if err == nil {
			all[string(k)], err = r.decode()
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return all
}

// TestRestoreReplicas restores states of a random past into random states, on two machines that cut the
// log into different transactions. Both end equal, byte by byte, with the values of the backup; what was
// alike is as it was; and everything that says so about itself is sound. CONFMAN_SEED repeats a run.
func TestRestoreReplicas(t *testing.T) {
	t.Parallel()
	seed, err := strconv.ParseUint(cmp.Or(os.Getenv("CONFMAN_SEED"), strconv.FormatUint(rand.Uint64(), 10)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("CONFMAN_SEED=%d", seed)
	w := newWriter(t, t.TempDir())
	a := &author{rand.New(rand.NewPCG(seed, 2)), w}
	one, other := newMachine(t, w.st), newMachine(t, newWriter(t, t.TempDir()).st)
	var log []*raft.Log
	do := func(cmds ...*command) {
		t.Helper()
		logs := a.entries(cmds...)
		log = append(log, logs...)
		one.apply(t, logs)
	}
	live := 0 // restores that changed something
	backups := [][]byte{backupOf(t, w.st)}
	for round := range rounds(6, 40) {
		for range 5 + a.IntN(60) {
			do(a.command())
		}
		if round == 0 { // the store is empty in the first one, and is filled again by the next
			do(set("app", "large", strings.Repeat("l", stagedBytes)), set("Z", "large", strings.Repeat("l", stagedBytes/2)))
		}
		backups = append(backups, backupOf(t, w.st))
		for range a.IntN(60) {
			do(a.command())
		}
		b := backups[a.IntN(len(backups))]
		want := modelOf(t, func(f func(*bbolt.Tx) error) error { return readBytes(t, b, f) })
		if a.IntN(2) == 0 { // one that came to nothing
			given := restoreCommands(t, backups[a.IntN(len(backups))], "given-up")
			do(given[:len(given)-1]...)
			switch a.IntN(3) {
			case 0:
				do(&command{Op: "unstage", Restore: &restoring{ID: "another's"}})
			case 1:
				do(&command{Op: "unstage", Restore: &restoring{ID: "given-up"}})
			}
		}
		cmds := restoreCommands(t, b, fmt.Sprint("r", round))
		for _, c := range cmds[:len(cmds)-1] {
			was := *w.st.at()
			do(c)
			if now := *w.st.at(); now.rev != was.rev || now.hash != was.hash {
				t.Fatalf("a stage command moves the revision from %d to %d", was.rev, now.rev)
			}
			if a.IntN(2) == 0 {
				do(a.command())
			}
		}
		var before map[string]entry
		if err := w.st.view(func(tx *bbolt.Tx) error { before = recordsOf(t, tx); return nil }); err != nil {
			t.Fatal(err)
		}
		was, wasSpaces := w.st.at().rev, modelOf(t, w.st.view).spaces
		do(cmds[len(cmds)-1])
		got := modelOf(t, w.st.view)
		if d := gocmp.Diff(want, got, gocmp.AllowUnexported(model{})); d != "" {
			t.Fatalf("round %d (-backup +restored):\n%s", round, d)
		}
		checkRestored(t, w.st, before, want, was, !maps.Equal(wasSpaces, want.spaces), &live)
		// Once more, and out of turn: nothing.
		was = w.st.at().rev
		for _, c := range restoreCommands(t, b, "again") {
			do(c)
		}
		do(cmds[len(cmds)-1], cmds[len(cmds)-2])
		if now := w.st.at().rev; now != was {
			t.Errorf("restored again, the store goes from revision %d to %d", was, now)
		}
	}
	do(a.command())
	for next := 0; next < len(log); {
		n := min(len(log), next+1+a.IntN(200))
		other.apply(t, log[next:n])
		next = n
	}
	if d := gocmp.Diff(one.said, other.said); d != "" {
		t.Errorf("answers (-one +other):\n%s", d)
	}
	err = one.store.view(func(ta *bbolt.Tx) error {
		return other.store.view(func(tb *bbolt.Tx) error { return diffBuckets("", ta, tb) })
	})
	if err != nil || *one.store.at() != *other.store.at() {
		t.Errorf("%v; at %+v and %+v", err, *one.store.at(), *other.store.at())
	}
	if live < 3 {
		t.Errorf("%d restores changed something", live)
	}
}

// checkRestored holds a restored state against what was there before, at revision was.
func checkRestored(t *testing.T, st *store, before map[string]entry, want model, was uint64, spaces bool, live *int) {
	t.Helper()
	changed := 0
	err := st.view(func(tx *bbolt.Tx) error {
		rev := storedRevision(tx)
		after := recordsOf(t, tx)
		for k, e := range after {
			old, there := before[k]
			switch {
			case there && old.Value == e.Value && old.Type == e.Type:
				if old != e {
					t.Errorf("%q was alike and is %+v, was %+v", k, e, old)
				}
				continue
			case e.Version != old.Version+1 || e.Revision != rev || e.UpdatedBy != "restorer@test":
				t.Errorf("%q is %+v, was %+v, at revision %d", k, e, old, rev)
			}
			changed++
			r, _, err := getEntry(tx, []byte(k))
			if err != nil {
				return err
			}
			for v := uint64(1); v < e.Version; v++ {
				if _, err := findVersion(tx, r, v); err != errTrimmed {
					t.Errorf("version %d of %q: %v", v, k, err)
				}
			}
		}
		for k := range before {
			if _, there := after[k]; !there {
				changed++
			}
		}
		if tx.Bucket(bucketStaging) != nil {
			t.Error("something is staged still")
		}
		next, err := newestFirst(tx, "", endOf(rev), nil)
		if err != nil {
			return err
		}
		at, ev, err := next()
		if err != nil {
			return err
		}
		if changed == 0 && !spaces {
			if rev != was {
				t.Errorf("nothing differed, and the revision went from %d to %d", was, rev)
			}
			return nil
		}
		*live++
		e, err := ev.decode()
		if err != nil {
			return err
		}
		said := fmt.Sprintf(`{"sha256":%q,"revision":7,"changed":%d}`, "sum-"+strings.TrimPrefix(e.CorrelationID, "id-"), changed)
		if rev != was+1 || at != (place{rev, 0}) || e.Action != "store.restore" || e.NewValue == nil || *e.NewValue != said || e.Actor != "restorer@test" || e.Source != "::1" {
			t.Errorf("from revision %d to %d; the event is %s, want %s", was, rev, ev.json, said)
		}
		if p, err := lastRestore(tx, endOf(rev)); err != nil || p != at {
			t.Errorf("the last restore is at %v (%v), want %v", p, err, at)
		}
		return errors.Join(checkEntries(tx), checkRecords(tx), checkChain(tx), checkForms(tx))
	})
	if err != nil {
		t.Error(err)
	}
}

// read asks a server without a cluster.
func read(s *server, path string) *answer {
	rec := httptest.NewRecorder()
	r := httptest.NewRequest("GET", path, nil)
	r.Header.Set("X-API-Key", adminKey)
	s.ServeHTTP(rec, r)
	return &answer{rec.Code, rec.Header(), rec.Body.Bytes()}
}

// TestRestoreShown: the trail of each namespace, read page by page in pages of any size, has the events of
// restores among its own, from the newest to the oldest.
func TestRestoreShown(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	s := newReader(t, w)
	empty := backupOf(t, w.st)
	w.apply(set("app", "k", "1"), set("other", "k", "1"), set("app", "k", "2"), set("later", "k", "1"))
	full := backupOf(t, w.st)
	w.apply(restoreCommands(t, empty, "a")...) // 5
	w.apply(restoreCommands(t, full, "b")...)  // 6
	w.apply(set("app", "k", "3"))
	w.apply(restoreCommands(t, full, "c")...) // 8
	w.apply(set("other", "k", "2"))
	for ns, want := range map[string]string{
		"app":   "8-0 7-0 6-0 5-0 3-0 1-0",
		"other": "9-0 8-0 6-0 5-0 2-0",
		"later": "8-0 6-0 5-0 4-0",
	} {
		for limit := 1; limit <= 7; limit++ {
			var got []string
			for cursor := ""; ; {
				a := read(s, fmt.Sprintf("/api/v1/audit/%s?stale&limit=%d&cursor=%s", ns, limit, cursor))
				var page struct {
					Items      []eventDoc
					Pagination struct{ NextCursor *string }
				}
				if err := json.Unmarshal(a.body, &page); err != nil || a.status != 200 || len(page.Items) > limit {
					t.Fatalf("%s: %v (%v)", ns, a, err)
				}
				for _, e := range page.Items {
					got = append(got, e.ID)
				}
				if page.Pagination.NextCursor == nil {
					break
				}
				cursor = *page.Pagination.NextCursor
			}
			if strings.Join(got, " ") != want {
				t.Errorf("%s by %d: %v, want %s", ns, limit, got, want)
			}
		}
		for cursor, ok := range map[string]bool{
			cursorOf('a', place{6, 0}.appendTo(place{6, 0}.appendTo(nil))): false,
			cursorOf('a', place{9, 0}.appendTo(place{6, 0}.appendTo(nil))): false,
			cursorOf('a', place{0, 0}.appendTo(place{6, 0}.appendTo(nil))): true,
			cursorOf('a', place{0, 0}.appendTo(place{3, 0}.appendTo(nil))): false,
		} {
			if a := read(s, "/api/v1/audit/"+ns+"?stale&cursor="+cursor); (a.status == 200) != ok || a.status >= 500 {
				t.Errorf("%s from cursor %q: %v", ns, cursor, a)
			}
		}
	}
	if a := read(s, "/api/v1/audit/app?stale&key=k"); strings.Contains(string(a.body), "store.restore") {
		t.Errorf("of a key: %v", a)
	}
	if a := read(s, "/api/v1/audit/app?stale&correlationId=id-b"); !strings.Contains(string(a.body), `"id":"6-0"`) {
		t.Errorf("by its correlation id: %v", a)
	}
	// A conditional request about what a restore changed says who restored it.
	err := w.st.view(func(tx *bbolt.Tx) error {
		n, err := getNamespace(tx, "later")
		if err != nil {
			return err
		}
		cur, err := namespaceCurrent(tx, n)
		if err != nil || cur.Revision != 6 || cur.UpdatedBy != "restorer@test" {
			t.Errorf("later is %+v (%v)", cur, err)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// resealed is a backup with its pages changed and everything that says so made to fit: what remains is
// what the pages themselves can tell.
func resealed(head backupHeader, pages []byte) []byte {
	head.size, head.sum = int64(len(pages)), sha256.Sum256(pages)
	return append([]byte(head.line()), pages...)
}

// metaSum is the checksum of one of bbolt's meta pages.
func metaSum(page []byte) {
	h := fnv.New64a()
	h.Write(page[16:72])
	binary.NativeEndian.PutUint64(page[72:], h.Sum64())
}

// TestBackupBounds: a backup with what no request could have written is refused, and each of its parts of the
// log stays small.
func TestBackupBounds(t *testing.T) {
	t.Parallel()
	typed := func(typ, value string) *command {
		c := set("app", "k", value)
		c.Changes[0].Type = typ
		return c
	}
	for words, c := range map[string]*command{
		"at most 4194304":   set("app", "k", strings.Repeat("v", maxValue+1)),
		"not a JSON number": typed("number", "abc"),
		"not one JSON text": typed("json", "{"),
		"neither true":      typed("bool", "yes"),
		"":                  set("app", "k", strings.Repeat("v", maxValue)),
	} {
		w := newWriter(t, t.TempDir())
		w.apply(c)
		err := readBytes(t, backupOf(t, w.st), func(*bbolt.Tx) error { return nil })
		if (err == nil) != (words == "") || err != nil && (problemOf(err).kind != errInvalidValue || !strings.Contains(problemOf(err).detail, words)) {
			t.Errorf("%q: %v", words, err)
		}
	}
	for _, created := range []string{"", strings.Repeat("x", maxMeta), "2026-01-02T03:04:05Z"} {
		w := newWriter(t, t.TempDir())
		w.apply(set("app", "k", "v"))
		err := w.st.db.Update(func(tx *bbolt.Tx) error {
			n, err := getNamespace(tx, "app")
			if err != nil {
				return err
			}
			n.CreatedAt = created
			return n.put(tx, "app")
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := readBytes(t, backupOf(t, w.st), func(*bbolt.Tx) error { return nil }); err == nil || problemOf(err).kind != errInvalidValue {
			t.Errorf("made at %.40q: %v", created, err)
		}
	}
}

// TestBackupDamaged: a backup of which a bit, the end or the beginning is another is refused. One whose
// checksum was made to fit is refused for what it holds, or is what it was: it neither panics nor hangs.
func TestBackupDamaged(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	stateV1(w)
	var more []*command
	for i := range 60 {
		more = append(more, set("many", fmt.Sprintf("key%03d", i), strings.Repeat("v", i)))
	}
	w.apply(more...)
	good := backupOf(t, w.st)
	want := modelOf(t, w.st.view)
	var got model
	take := func(b []byte) error {
		return readBytes(t, b, func(tx *bbolt.Tx) error {
			got = modelOf(t, func(f func(*bbolt.Tx) error) error { return f(tx) })
			return nil
		})
	}
	if err := take(good); err != nil || gocmp.Diff(want, got, gocmp.AllowUnexported(model{})) != "" {
		t.Fatalf("a good one: %v", err)
	}
	line := bytes.IndexByte(good, '\n') + 1
	pages := good[line:]
	head, err := parseBackupHeader(string(good[:line]))
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, b []byte, words string) {
		t.Helper()
		err := take(b)
		if p := problemOf(err); err == nil || p.kind != errInvalidValue || !strings.Contains(p.detail, words) || strings.Contains(p.detail, "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("nothing", nil, "not a backup")
	refused("text", bytes.Repeat([]byte("a backup "), 10_000), "not a backup")
	refused("pages alone", pages, "not a backup")
	refused("a newer one", bytes.Replace(good, []byte("confman-backup 1 "), []byte("confman-backup 2 "), 1), "format 2")
	refused("more at the end", append(bytes.Clone(good), 0), "goes on")
	refused("another line end", bytes.Replace(good, []byte("\n"), []byte("\r\n"), 1), "damaged")
	refused("a negative size", []byte(strings.Replace(string(good[:line]), " size=", " size=-", 1)), "damaged")
	refused("another revision", append([]byte(strings.Replace(string(good[:line]), "revision=7", "revision=8", 1)), pages...), "another")
	r := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		refused("cut", good[:r.IntN(len(good))], "")
		b := bytes.Clone(good)
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		refused("a bit", b, "")
	}

	// What bbolt would not survive.
	const size = 4096
	change := func(what string, f func(b []byte)) {
		t.Helper()
		b := bytes.Clone(pages)
		f(b)
		metaSum(b[:size])
		metaSum(b[size:])
		refused(what, resealed(head, b), "damaged")
	}
	order := binary.NativeEndian
	root := order.Uint64(pages[32:])
	branch := 0
	for at := 2 * size; at < len(pages); at += size {
		if order.Uint16(pages[at+8:]) == 1 {
			branch = at
		}
	}
	if branch == 0 {
		t.Fatal("no page is a branch")
	}
	change("a branch that is its own child", func(b []byte) { order.PutUint64(b[branch+24:], uint64(branch/size)) })
	change("a child that is not there", func(b []byte) { order.PutUint64(b[branch+24:], 1<<40) })
	change("a root that is not there", func(b []byte) { order.PutUint64(b[32:], 1<<50); order.PutUint64(b[size+32:], 1<<50) })
	change("a page with a long overflow", func(b []byte) { order.PutUint32(b[root*size+12:], 1<<31) })
	change("more items than a page has", func(b []byte) { order.PutUint16(b[root*size+10:], 60_000) })
	change("a page of no kind", func(b []byte) { order.PutUint16(b[branch+8:], 0) })
	change("meta pages that differ", func(b []byte) { order.PutUint64(b[32:], 2) })
	change("pages of another size", func(b []byte) { order.PutUint32(b[24:], 1<<30); order.PutUint32(b[size+24:], 1<<30) })
	refused("half of the pages", resealed(head, pages[:len(pages)/size/2*size]), "damaged")
	refused("one page", resealed(head, pages[:size]), "damaged")

	accepted := 0
	for range rounds(200, 20_000) {
		b := bytes.Clone(pages)
		at := r.IntN(len(b))
		if r.IntN(2) == 0 { // where pages say what they are
			at = at/size*size + r.IntN(128)
		}
		b[at] ^= 1 << r.IntN(8)
		err := take(resealed(head, b))
		if err == nil { // a byte that means nothing
			accepted++
			if d := gocmp.Diff(want, got, gocmp.AllowUnexported(model{})); d != "" {
				t.Errorf("byte %d is another, and so is what is read:\n%s", at, d)
			}
		} else if problemOf(err).kind != errInvalidValue {
			t.Errorf("byte %d: %v", at, err)
		}
	}
	t.Logf("%d bytes, %d changes were of no meaning", len(pages), accepted)
}

// TestBackupForms: a backup with sound pages and checksums is refused when it holds what a store cannot.
func TestBackupForms(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	stateV1(w)
	good := backupOf(t, w.st)
	for name, change := range map[string]func(tx *bbolt.Tx) error{
		"a namespace's count": func(tx *bbolt.Tx) error {
			n, err := getNamespace(tx, "billing")
			n.keys++
			return errors.Join(err, n.put(tx, "billing"))
		},
		"keys of a namespace that is deleted": func(tx *bbolt.Tx) error {
			n, err := getNamespace(tx, "billing")
			n.deleted = true
			return errors.Join(err, n.put(tx, "billing"))
		},
		"a short namespace": func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketNamespaces).Put([]byte("x"), seal([]byte("x"), make([]byte, 9)))
		},
		"a key of no namespace": func(tx *bbolt.Tx) error {
			k := []byte("nothing")
			return tx.Bucket(bucketConfig).Put(k, seal(k, make([]byte, 40)))
		},
		"an entry at another's place": func(tx *bbolt.Tx) error {
			k := entryKey("many", "versions")
			e, _, err := getEntry(tx, k)
			v, derr := e.decode()
			v.Key = "other"
			rec, _ := v.record(k, e.places)
			return errors.Join(err, derr, tx.Bucket(bucketConfig).Put(k, rec))
		},
		"a type that is none": func(tx *bbolt.Tx) error {
			k := entryKey("many", "versions")
			e, _, err := getEntry(tx, k)
			v, derr := e.decode()
			v.Type = "No type"
			rec, _ := v.record(k, e.places)
			return errors.Join(err, derr, tx.Bucket(bucketConfig).Put(k, rec))
		},
		"an event less": func(tx *bbolt.Tx) error { return tx.Bucket(bucketTrail).Delete(place{3, 0}.appendTo(nil)) },
		"no trail":      func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketTrail) },
		"no meta":       func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketMeta) },
		"a newer format": func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketMeta).Put([]byte("format"), []byte{0, 0, 0, 9})
		},
	} {
		b := newWriter(t, t.TempDir())
		if err := b.st.replace(bytes.NewReader(good[bytes.IndexByte(good, '\n')+1:])); err != nil {
			t.Fatal(err)
		}
		pos := *b.st.at()
		if err := b.st.db.Update(change); err != nil {
			t.Fatal(name, err)
		}
		var pages bytes.Buffer
		if err := b.st.view(func(tx *bbolt.Tx) error { _, err := tx.WriteTo(&pages); return err }); err != nil {
			t.Fatal(err)
		}
		err := readBytes(t, resealed(backupHeader{revision: pos.rev, hash: pos.hash}, pages.Bytes()), func(*bbolt.Tx) error { return nil })
		if err == nil || problemOf(err).kind != errInvalidValue {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSpoolRoom: a spool is refused where too little would be left, and leaves no file.
func TestSpoolRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := newSpool(dir, 1<<50, 0); problemOf(err).kind != errNoSpace {
		t.Errorf("a spool of 1 PiB: %v", err)
	}
	if _, err := newSpool(dir, 1, 1<<50); problemOf(err).kind != errNoSpace {
		t.Errorf("1 PiB to stay free: %v", err)
	}
	sp, err := newSpool(dir, 1<<20, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer sp.f.Close()
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("%v are left (%v)", names, err)
	}
}

// TestTooManyBackups: a node that sends as many backups as it may refuses one more.
func TestTooManyBackups(t *testing.T) {
	t.Parallel()
	s := newReader(t, newWriter(t, t.TempDir()))
	for range maxBackups {
		s.backups <- struct{}{}
	}
	if a := read(s, "/api/v1/backup?stale"); a.status != 429 || a.header.Get("Retry-After") == "" {
		t.Error(a)
	}
}

// FuzzBackup: bytes laid over the pages of a backup, whose checksum is made to fit, are refused or read.
func FuzzBackup(f *testing.F) {
	w := newWriter(f, f.TempDir())
	stateV1(w)
	good := backupOf(f, w.st)
	line := bytes.IndexByte(good, '\n') + 1
	head, err := parseBackupHeader(string(good[:line]))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint(0), []byte{}, false)
	f.Add(uint(24), []byte{0, 0, 0, 0}, true)
	f.Add(uint(2*4096+8), []byte{1, 0, 255, 255, 255, 255}, false)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, at uint, over []byte, metas bool) {
		pages := bytes.Clone(good[line:])
		copy(pages[at%uint(len(pages)):], over)
		if metas {
			metaSum(pages)
			metaSum(pages[4096:])
		}
		_, sp, db, err := readBackup(bytes.NewReader(resealed(head, pages)), func(size int64) (*spool, error) { return newSpool(dir, size, 0) })
		if err != nil {
			if problemOf(err).kind != errInvalidValue {
				t.Fatal(err)
			}
			return
		}
		db.Close()
		sp.f.Close()
	})
}
