package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// An author makes a log of random commands. It looks at the state that they make, so
// that conditions often hold and deletes often find something.
type author struct {
	*rand.Rand
	*writer
}

// randomKeys are the keys of a namespace: few, so that they have long histories, and
// with names that lie beside each other in the store's order.
var randomKeys = strings.Fields("a a/b a/b/c a.b ab b \u00fc \U0001f600 k1 k10 k100 k2 k3 k4 k5 k6")

// pick returns one of some strings.
func (a *author) pick(some ...string) string { return some[a.IntN(len(some))] }

// ns names a namespace: mostly one of two, so that the others are often empty.
func (a *author) ns() string { return a.pick("app", "app", "app", "ap", "ap", "empty", "rare", "Z") }

// change makes a change of a key: a new value, often one that it has already, or none.
func (a *author) change(key string, deletes bool) change {
	if deletes && a.IntN(3) == 0 {
		return change{Key: key}
	}
	v := a.pick("", "true", "1", `{"a":[1]}`, "\x00\n\"\\\u2028", strconv.Itoa(a.IntN(4)), strings.Repeat("v", a.IntN(3000)))
	return change{Key: key, Value: &v, Type: a.pick("string", "string", "toml", "x")}
}

// condition makes a condition about what command c changes; most are none.
func (a *author) condition(c *command) (cond condition) {
	if a.IntN(3) > 0 {
		return cond
	}
	revs := []uint64{a.Uint64N(a.st.at().rev + 2)}
	err := a.st.view(func(tx *bbolt.Tx) error {
		if n, err := getNamespace(tx, c.NS); c.Op != "set" && c.Op != "delete" {
			if n != nil {
				revs = append(revs, n.rev)
			}
			return err
		}
		e, ok, err := getEntry(tx, entryKey(c.NS, c.Changes[0].Key))
		if ok {
			revs = append(revs, e.rev)
		}
		return err
	})
	if err != nil {
		a.tb.Fatal(err)
	}
	switch a.IntN(5) {
	case 0:
		return condition{hasMatch: true, matchAny: true}
	case 1:
		return condition{hasNone: true, noneAny: true}
	case 2:
		return condition{hasNone: true, none: revs}
	}
	return condition{hasMatch: true, match: revs}
}

// command makes a command.
func (a *author) command() *command {
	c := &command{NS: a.ns(), Actor: a.pick("ops@test", "svc \"x\"@test"), Source: a.pick("127.0.0.1", "::1"), ID: strconv.Itoa(a.IntN(100))}
	switch a.IntN(10) {
	default:
		c.Op, c.Changes = "set", []change{a.change(a.pick(randomKeys...), false)}
	case 5, 6:
		c.Op, c.Changes = "delete", []change{{Key: a.pick(randomKeys...)}}
	case 7:
		c.Op = "patch"
		for i, k := range slices.Sorted(slices.Values(randomKeys)) {
			if i%2 == a.IntN(3) {
				c.Changes = append(c.Changes, a.change(k, true))
			}
		}
	case 8:
		c.Op, c.Meta = "describe", &nsMeta{Description: a.pick("", "one\ntwo"), Owner: a.pick("", "team")}
	case 9:
		c.Op = "drop"
		if a.IntN(2) == 0 { // often of one that can go
			c.NS = a.pick("empty", "rare", "Z")
		}
	}
	switch keyed := len(c.Changes) > 0; {
	case c.NS == "empty" && keyed: // it never holds a key and is dropped as often as made
		c.NS = "app"
	case c.NS == "rare" && keyed && c.Op != "patch": // one key, so it is emptied as often as filled
		c.Changes[0].Key = "k"
	}
	c.If = a.condition(c)
	c.At = a.now + a.Int64N(2_000_000_000) - 500_000_000 // clocks of successive leaders differ
	if a.IntN(10) == 0 {
		c.Until = a.now + 1_500_000_000
	}
	return c
}

// A machine is a state machine under test and what it said of each log entry.
type machine struct {
	*fsm
	said map[uint64]string
}

func newMachine(t *testing.T, st *store) *machine {
	halt := func(err error) { t.Fatal(err) }
	return &machine{&fsm{store: st, log: slog.New(slog.DiscardHandler), disk: newDisk(st.dir, 1, slog.New(slog.DiscardHandler), halt), halt: halt}, map[uint64]string{}}
}

// apply delivers a batch. An entry delivered again must say nothing, and one that a
// restored state lacks must say what it said.
func (m *machine) apply(t *testing.T, logs []*raft.Log) {
	t.Helper()
	at := m.store.at().index
	out := m.ApplyBatch(logs)
	if len(out) != len(logs) {
		t.Fatalf("%d answers to %d entries", len(out), len(logs))
	}
	for i, l := range logs {
		text := ""
		results, ok := out[i].([]*result)
		if !ok && out[i] != nil {
			t.Fatalf("entry %d: answer %T", l.Index, out[i])
		}
		for _, res := range results {
			if res.err != nil {
				p := problemOf(res.err)
				text += fmt.Sprintf("%s: %s, %+v\n", p.kind.slug, p.detail, p.current)
				continue
			}
			text += fmt.Sprintf("revision %d: created %t, changed %d, tag %d, %s\n", res.rev, res.created, res.changed, res.etag, res.body)
		}
		if (text != "") != (l.Index > at && l.Type == raft.LogCommand) {
			t.Fatalf("entry %d of kind %v, at index %d: %q", l.Index, l.Type, at, text)
		}
		if was, ok := m.said[l.Index]; text != "" && ok && was != text {
			t.Fatalf("entry %d: %s\nbefore: %s", l.Index, text, was)
		} else if text != "" {
			m.said[l.Index] = text
		}
	}
}

// TestReplicas applies one log of random commands on two state machines. They cut it
// into different batches, both are handed entries again that they have, and one goes
// back to snapshots of itself: they must end equal, byte by byte, and as the trail says.
// CONFMAN_SEED repeats a run.
func TestReplicas(t *testing.T) {
	t.Parallel()
	count := 50_000
	if os.Getenv("CONFMAN_LONG") == "" {
		count = 5_000
	}
	seed, err := strconv.ParseUint(cmp.Or(os.Getenv("CONFMAN_SEED"), strconv.FormatUint(rand.Uint64(), 10)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("CONFMAN_SEED=%d", seed)
	w := newWriter(t, t.TempDir())
	a := &author{rand.New(rand.NewPCG(seed, 1)), w}
	one, other := newMachine(t, w.st), newMachine(t, newWriter(t, t.TempDir()).st)

	// The first machine applies while the log is written, for its author looks at its state.
	var log []*raft.Log
	for len(log) < count {
		batch := make([]*raft.Log, 0, 40)
		for range 1 + a.IntN(40) {
			if a.IntN(50) == 0 { // what raft writes for itself
				a.index++
				kind := []raft.LogType{raft.LogConfiguration, raft.LogNoop, raft.LogBarrier}[a.IntN(3)]
				batch = append(batch, &raft.Log{Index: a.index, Type: kind, Data: []byte("not a command")})
				continue
			}
			cmds := []*command{a.command()}
			for a.IntN(3) == 0 {
				cmds = append(cmds, a.command())
			}
			l := a.entry(cmds...)
			// Appended when the command was proposed, or a second later: after some deadlines.
			l.AppendedAt = time.Unix(0, a.now+int64(a.IntN(2))*int64(time.Second))
			batch = append(batch, l)
		}
		log = append(log, batch...)
		one.apply(t, log[max(0, len(log)-len(batch)-a.IntN(3)):])
		if a.IntN(20) == 0 {
			at := *one.store.at()
			one.apply(t, log[a.IntN(len(log)):])
			if *one.store.at() != at {
				t.Fatalf("entries delivered again moved the store from %+v to %+v", at, *one.store.at())
			}
		}
	}
	one.apply(t, log)

	var kept []byte // a snapshot of the other machine
	restored := 0
	for other.store.at().index < uint64(len(log)) {
		next := int(other.store.at().index) // log[next] is the first that it lacks
		from := max(0, next-a.IntN(5)*a.IntN(20))
		other.apply(t, log[from:min(len(log), next+1+a.IntN(100))])
		switch r := a.IntN(20); {
		case r < 3:
			kept = bytes.Clone(snapshotOf(t, other.store).Bytes())
		case r < 6 && kept != nil:
			if err := other.Restore(io.NopCloser(bytes.NewReader(kept))); err != nil {
				t.Fatal(err)
			}
			kept = nil
			restored++
		}
	}
	at := *other.store.at()
	other.apply(t, log)
	if *other.store.at() != at {
		t.Errorf("the log delivered again moved the store from %+v to %+v", at, *other.store.at())
	}

	if restored == 0 {
		t.Error("no snapshot was restored")
	}
	if at != *one.store.at() {
		t.Errorf("positions %+v and %+v", *one.store.at(), at)
	}
	if diff := gocmp.Diff(one.said, other.said); diff != "" {
		t.Errorf("answers (-one +other):\n%s", diff)
	}
	err = one.store.view(func(ta *bbolt.Tx) error {
		return other.store.view(func(tb *bbolt.Tx) error { return diffBuckets("", ta, tb) })
	})
	for _, err := range []error{err, one.store.view(checkState), other.store.view(checkState)} {
		if err != nil {
			t.Error(err)
		}
	}
	for _, kind := range []string{"revision ", "not-found: there is no key", "not-found: there is no namespace",
		"conflict: ", "precondition-failed: ", "unavailable: "} {
		if !slices.ContainsFunc(slices.Collect(maps.Values(one.said)), func(s string) bool { return strings.HasPrefix(s, kind) }) {
			t.Errorf("no answer was %q", kind)
		}
	}
	t.Logf("%d entries, revision %d, %d restores", len(log), at.rev, restored)
}

// TestStoredCommands: commands that earlier versions wrote to their logs are read. New
// members may join them; none of these may be changed.
func TestStoredCommands(t *testing.T) {
	t.Parallel()
	str := func(s string) *string { return &s }
	// sealed puts the checksum in front: CRC-32C, big-endian.
	sealed := func(texts ...string) []byte {
		text := strings.Join(texts, "")
		sum := crc32.Checksum([]byte(text), crc32.MakeTable(crc32.Castagnoli))
		return append([]byte{byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)}, text...)
	}
	for text, want := range map[string]*command{
		`{"op":"set","ns":"app","changes":[{"k":"a/b","v":"x\u2028","t":"string"}],"if":{"m":"[7 8]","n":""},"actor":"ops","source":"::1","id":"c","at":5}`: {
			Op: "set", NS: "app", Changes: []change{{"a/b", str("x\u2028"), "string"}},
			If: condition{hasMatch: true, match: []uint64{7, 8}}, Actor: "ops", Source: "::1", ID: "c", At: 5},
		`{"op":"delete","ns":"app","changes":[{"k":"a"}],"if":{"m":"*","n":""},"actor":"ops","source":"","id":"","at":5}`: {
			Op: "delete", NS: "app", Changes: []change{{Key: "a"}}, If: condition{hasMatch: true, matchAny: true}, Actor: "ops", At: 5},
		`{"op":"patch","ns":"app","changes":[{"k":"a","v":"","t":"json"},{"k":"b"}],"if":{"m":"","n":"*"},"actor":"ops","source":"","id":"","at":5}`: {
			Op: "patch", NS: "app", Changes: []change{{"a", str(""), "json"}, {Key: "b"}}, If: condition{hasNone: true, noneAny: true}, Actor: "ops", At: 5},
		`{"op":"describe","ns":"app","meta":{"description":"d","owner":"o","createdAt":""},"if":{"m":"","n":"[]"},"actor":"ops","source":"","id":"","at":5}`: {
			Op: "describe", NS: "app", Meta: &nsMeta{Description: "d", Owner: "o"}, If: condition{hasNone: true}, Actor: "ops", At: 5},
		`{"op":"drop","ns":"app","actor":"ops","source":"","id":"","at":5,"until":9,"later":true}`: {Op: "drop", NS: "app", Actor: "ops", At: 5, Until: 9},
	} {
		got, err := decodeOne(sealed(text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(condition{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
		// What it writes now says the same.
		again, err := encode(got)
		if err != nil {
			t.Fatal(err)
		}
		var a, b map[string]any
		if err := errors.Join(json.Unmarshal([]byte(text), &a), json.Unmarshal(again[4:], &b)); err != nil {
			t.Fatal(err)
		}
		delete(a, "later")
		if diff := gocmp.Diff(a, b); diff != "" {
			t.Errorf("%s is written anew as (-was +is):\n%s", text, diff)
		}
	}
	several, err := decodeCommands(sealed(`{"op":"drop","ns":"a"}`+"\n", `{"op":"drop","ns":"b"}`+"\n", `{"op":"drop","ns":"c"}`+"\n"))
	if err != nil || len(several) != 3 || several[0].NS != "a" || several[1].NS != "b" || several[2].NS != "c" {
		t.Errorf("an entry of three commands is read as %v, %v", several, err)
	}
}

// TestFailingStore: an FSM whose store cannot apply the log does not go on: it ends the node, with
// the file and what to do, also where bbolt itself panics on what it finds there.
func TestFailingStore(t *testing.T) {
	t.Parallel()
	for _, m := range []struct {
		name string
		fail func(t *testing.T, w *writer)
		want string
	}{
		{"closed", func(t *testing.T, w *writer) { w.st.db.Close() }, "not open"},
		{"damaged record", func(t *testing.T, w *writer) {
			err := w.st.db.Update(func(tx *bbolt.Tx) error {
				b, key := tx.Bucket([]byte("config")), []byte("app\x00k")
				rec := bytes.Clone(b.Get(key))
				rec[len(rec)-3] ^= 1
				return b.Put(key, rec)
			})
			if err != nil {
				t.Fatal(err)
			}
		}, "checksum"},
		{"damaged page", func(t *testing.T, w *writer) {
			var root int64 // of a bucket that is large enough for a page of its own
			err := w.st.view(func(tx *bbolt.Tx) error {
				root = int64(tx.Bucket([]byte("config")).Root())
				return nil
			})
			if err != nil || root == 0 {
				t.Fatalf("the bucket config begins at page %d, %v", root, err)
			}
			f, err := os.OpenFile(w.st.path(), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			// A page is id[8] flags[2] count[2] overflow[4] and what it holds.
			if _, err := f.WriteAt([]byte{0xff, 0xff}, root*int64(os.Getpagesize())+8); err != nil {
				t.Fatal(err)
			}
		}, "page"},
	} {
		t.Run(m.name, func(t *testing.T) {
			w := newWriter(t, t.TempDir())
			w.apply(set("app", "k", "v"), set("app", "large", strings.Repeat("x", 10_000)))
			logs := w.entries(set("app", "k", "w"))
			m.fail(t, w)
			ended := make(chan error, 1)
			halt := func(err error) {
				ended <- err
				select {} // like the real one, it does not return
			}
			go func() {
				defer func() {
					if p := recover(); p != nil {
						ended <- fmt.Errorf("panic: %v", p)
					}
				}()
				f := &fsm{store: w.st, log: slog.New(slog.DiscardHandler), disk: &disk{busy: map[uint64]*stall{}}, halt: halt}
				ended <- fmt.Errorf("ApplyBatch returns %v", f.ApplyBatch(logs))
			}()
			names(t, (<-ended).Error(), w.st.path(), m.want, "; ")
		})
	}
}

// TestUnknownCommand: an operation of a newer program is an error that stops the node.
func TestUnknownCommand(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	before := *w.st.at()
	if _, err := w.st.apply(w.entries(set("app", "k", "w"), &command{Op: "rename", NS: "app"})); err == nil || !strings.Contains(err.Error(), `"rename"`) {
		t.Errorf("apply: %v", err)
	}
	if *w.st.at() != before {
		t.Errorf("the store moved from %+v to %+v", before, *w.st.at())
	}
	w.check()
}
