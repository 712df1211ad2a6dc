package main

// The stored format, restated by hand from the tables in store.go: nothing in
// checkState and in TestStoredExample is read with the program's own code, so
// that a change of the format shows here, wherever it is made.

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

var update = flag.Bool("update", false, "write anew what the selected test compares with: a file of testdata, or what the manual shows")

// A writer is a store and the log that makes it. Every command goes through the
// bytes that raft carries.
type writer struct {
	tb    testing.TB
	st    *store
	index uint64
	now   int64 // time of the newest command; each is one second after the one before
}

// newWriter opens the store in dir, an empty directory or one with a state file.
func newWriter(tb testing.TB, dir string) *writer {
	tb.Helper()
	st, _, err := openStore(dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { st.db.Close() })
	w := &writer{tb: tb, st: st, index: st.at().index, now: st.at().nanos}
	if w.now == 0 {
		w.now = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC).UnixNano()
	}
	return w
}

// encode makes the data of a raft entry that holds these commands.
func encode(cmds ...*command) (data []byte, err error) {
	data = make([]byte, 4)
	for _, c := range cmds {
		if data, err = c.appendTo(data); err != nil {
			return nil, err
		}
	}
	return sealCommands(data), nil
}

// decodeOne is the reverse of encode for one command.
func decodeOne(data []byte) (*command, error) {
	cs, err := decodeCommands(data)
	if err != nil {
		return nil, err
	}
	if len(cs) != 1 {
		return nil, fmt.Errorf("%d commands, not one", len(cs))
	}
	return cs[0], nil
}

// entry makes a log entry of commands, stamped as a leader does.
func (w *writer) entry(cmds ...*command) *raft.Log {
	w.tb.Helper()
	w.index++
	for _, c := range cmds {
		w.now += int64(time.Second)
		if c.At == 0 {
			c.At = w.now
		}
	}
	data, err := encode(cmds...)
	if err != nil {
		w.tb.Fatal(err)
	}
	return &raft.Log{Index: w.index, Type: raft.LogCommand, Data: data}
}

// entries makes a log entry of each command.
func (w *writer) entries(cmds ...*command) (logs []*raft.Log) {
	w.tb.Helper()
	for _, c := range cmds {
		logs = append(logs, w.entry(c))
	}
	return logs
}

// apply applies commands in one batch.
func (w *writer) apply(cmds ...*command) (results []*result) {
	w.tb.Helper()
	out, err := w.st.apply(w.entries(cmds...))
	if err != nil {
		w.tb.Fatal(err)
	}
	for _, o := range out {
		results = append(results, o.([]*result)...)
	}
	return results
}

// set makes the command that sets a key to a string.
func set(ns, key, value string) *command {
	return &command{Op: "set", NS: ns, Changes: []change{{Key: key, Value: &value, Type: "string"}},
		Actor: "ops@test", Source: "127.0.0.1", ID: "id-" + key}
}

// unset makes the command that deletes a key.
func unset(ns, key string) *command {
	return &command{Op: "delete", NS: ns, Changes: []change{{Key: key}}, Actor: "ops@test", Source: "127.0.0.1", ID: "id-" + key}
}

// check holds the state file against its description.
func (w *writer) check() {
	w.tb.Helper()
	if err := w.st.view(checkState); err != nil {
		w.tb.Error(err)
	}
}

// crcOf is the checksum of a record: CRC-32C of the key and of what follows the checksum.
func crcOf(key, rest []byte) []byte {
	sum := crc32.Checksum(slices.Concat(key, rest), crc32.MakeTable(crc32.Castagnoli))
	return binary.BigEndian.AppendUint32(nil, sum)
}

// TestStoredExample: the example in the description of the format, byte by byte.
func TestStoredExample(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	var before []*command
	for i := range 257 {
		before = append(before, set("other", "k", fmt.Sprint(i)))
	}
	w.apply(before...)
	prev := hex.EncodeToString(w.st.at().hash[:])
	url := "postgres://<db>/?a=\u2028&b=\"\x01\""
	c := set("billing", "db.url", url)
	c.At = time.Date(2026, 1, 2, 4, 0, 0, 5, time.UTC).UnixNano()
	w.apply(c)

	const (
		at    = "2026-01-02T04:00:00.000000005Z"
		value = `"postgres://<db>/?a=` + "\u2028" + `&b=\"\u0001\""`
	)
	event := `{"id":"258-0","revision":258,"timestamp":"` + at + `","action":"config.set","actor":"ops@test",` +
		`"namespace":"billing","key":"db.url","type":"string","version":1,"oldValue":null,"newValue":` + value +
		`,"correlationId":"id-db.url","source":"127.0.0.1"}`
	hash := sha256.Sum256([]byte(prev + "\n" + event))
	event = strings.TrimSuffix(event, "}") + `,"hash":"` + hex.EncodeToString(hash[:]) + `"}`

	unhex := func(s string) []byte {
		b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	err := w.st.view(func(tx *bbolt.Tx) error {
		for _, r := range []struct{ bucket, key, rest, json string }{
			{"config", "62 69 6c 6c 69 6e 67 00 64 62 2e 75 72 6c",
				"00 00 00 00 00 00 01 02  00 00 00 00 00 00 00 01  01  00 00 00 00 00 00 01 02 00 00",
				`{"namespace":"billing","key":"db.url","value":` + value + `,"type":"string","version":1,"revision":258,` +
					`"updatedAt":"` + at + `","updatedBy":"ops@test"}`},
			{"namespaces", "62 69 6c 6c 69 6e 67",
				"00  00 00 00 00 00 00 00 01  00 00 00 00 00 00 01 02  00 00 00 00 00 00 01 02 00 00",
				`{"description":"","owner":"ops@test","createdAt":"` + at + `"}`},
			{"trail", "00 00 00 00 00 00 01 02 00 00",
				"00 00 00 00 00 00 00 00 00 00  00", event},
		} {
			key, rest := unhex(r.key), append(unhex(r.rest), r.json...)
			want := append(crcOf(key, rest), rest...)
			if got := tx.Bucket([]byte(r.bucket)).Get(key); !bytes.Equal(got, want) {
				t.Errorf("%s %s is\n%q\nwant\n%q", r.bucket, r.key, got, want)
			}
		}
		meta := map[string]string{}
		err := tx.Bucket([]byte("meta")).ForEach(func(k, v []byte) error {
			meta[string(k)] = hex.EncodeToString(v)
			return nil
		})
		want := map[string]string{"format": "00000001"}
		for k, rest := range map[string]string{"applied": "0000000000000102", "revision": "0000000000000102",
			"time": fmt.Sprintf("%016x", c.At), "hash": hex.EncodeToString(hash[:]),
			"events": "0000000000000102 0000000000000102"} {
			want[k] = hex.EncodeToString(crcOf([]byte(k), unhex(rest))) + strings.ReplaceAll(rest, " ", "")
		}
		if diff := cmp.Diff(want, meta); diff != "" {
			t.Errorf("meta (-want +got):\n%s", diff)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	w.check()
}

// checkState holds a state file against its description and against itself: the trail
// is walked from its beginning, and every other record must be what follows from it.
func checkState(tx *bbolt.Tx) error {
	u64 := binary.BigEndian.Uint64
	type place = string // ten bytes
	type stored struct {
		Namespace, Key, Value, Type string
		Version, Revision           uint64
		UpdatedAt, UpdatedBy        string
	}
	type life struct { // of a key, since it was made
		places []place // of the events that made versions 1, 2, ...
		entry  stored
	}
	type space struct {
		deleted bool
		keys    uint64
		rev     uint64
		last    place
		meta    struct{ Description, Owner, CreatedAt string }
	}
	lives, spaces := map[string]*life{}, map[string]*space{}
	none := strings.Repeat("\x00", 10)
	rev, n, last, hash := uint64(0), 0, "", strings.Repeat("0", 64)
	events := 0

	// record checks a record's checksum and returns the rest.
	record := func(bucket string, k, v []byte, least int) ([]byte, error) {
		if len(v) < 4+least || !bytes.Equal(v[:4], crcOf(k, v[4:])) {
			return nil, fmt.Errorf("%s %q: %d bytes, or a wrong checksum", bucket, k, len(v))
		}
		return v[4:], nil
	}
	// placesIn cuts k places off b.
	placesIn := func(b []byte) (places []place, rest []byte, err error) {
		k := int(b[0])
		if b = b[1:]; len(b) < 10*k {
			return nil, nil, fmt.Errorf("%d places in %d bytes", k, len(b))
		}
		for i := range k {
			places = append(places, place(b[10*i:10*i+10]))
		}
		return places, b[10*k:], nil
	}

	err := tx.Bucket([]byte("trail")).ForEach(func(k, v []byte) error {
		b, err := record("trail", k, v, 11)
		if err != nil {
			return err
		}
		if len(k) != 10 {
			return fmt.Errorf("trail key %x", k)
		}
		events++
		if n++; u64(k) != rev {
			rev, n = rev+1, 0
		}
		if u64(k) != rev || int(binary.BigEndian.Uint16(k[8:])) != n {
			return fmt.Errorf("trail: %x stands where %d-%d belongs", k, rev, n)
		}
		var e struct {
			ID                                             string
			Revision                                       uint64
			Timestamp, Action, Actor, Namespace, Key, Type string
			Version                                        uint64
			OldValue, NewValue                             *string
			CorrelationID, Source, Hash                    string
		}
		places, text, err := placesIn(b[10:])
		if err == nil {
			err = json.Unmarshal(text, &e)
		}
		if err != nil {
			return fmt.Errorf("trail %x: %w", k, err)
		}
		wrong := func(format string, args ...any) error {
			return fmt.Errorf("event %s: %s: %s", e.ID, fmt.Sprintf(format, args...), text)
		}
		if e.ID != fmt.Sprintf("%d-%d", rev, n) || e.Revision != rev {
			return wrong("is at %x", k)
		}
		if e.Timestamp < last {
			return wrong("the one before is of %s", last)
		}
		last = e.Timestamp
		canonical, ok := bytes.CutSuffix(text, []byte(`,"hash":"`+e.Hash+`"}`))
		sum := sha256.Sum256([]byte(hash + "\n" + string(canonical) + "}"))
		if hash = hex.EncodeToString(sum[:]); !ok || e.Hash != hash {
			return wrong("the hash should be %s", hash)
		}

		ns := spaces[e.Namespace]
		prev := none
		if ns != nil {
			prev = ns.last
		}
		if string(b[:10]) != prev {
			return wrong("the event before it in its namespace is at %x, it says %x", prev, b[:10])
		}
		if ns == nil {
			ns = &space{deleted: true}
			spaces[e.Namespace] = ns
		}
		made := ns.deleted
		ns.rev, ns.last = rev, place(k)

		var wantPlaces []place
		id := e.Namespace + "\x00" + e.Key
		l := lives[id]
		switch e.Action {
		case "config.set":
			if made {
				ns.deleted = false
				ns.meta.Description, ns.meta.Owner, ns.meta.CreatedAt = "", e.Actor, e.Timestamp
			}
			if l == nil {
				l = &life{}
				lives[id] = l
				ns.keys++
				if e.OldValue != nil {
					return wrong("there was no value before")
				}
			} else if e.OldValue == nil || *e.OldValue != l.entry.Value {
				return wrong("the value before was %q", l.entry.Value)
			} else if *e.OldValue == *e.NewValue && e.Type == l.entry.Type {
				return wrong("it changes nothing")
			}
			v := uint64(len(l.places)) + 1
			for i := 0; v%(1<<i) == 0 && v > 1<<i; i++ {
				wantPlaces = append(wantPlaces, l.places[v-1<<i-1])
			}
			l.places = append(l.places, place(k))
			l.entry = stored{e.Namespace, e.Key, *e.NewValue, e.Type, v, rev, e.Timestamp, e.Actor}
			if e.Version != v {
				return wrong("it should be version %d", v)
			}
		case "config.delete":
			if l == nil || e.OldValue == nil || *e.OldValue != l.entry.Value || e.NewValue != nil || e.Type != l.entry.Type || e.Version != uint64(len(l.places)) {
				return wrong("that is not what was there: %+v", l)
			}
			delete(lives, id)
			ns.keys--
		case "namespace.set":
			if made {
				ns.deleted = false
				ns.meta.CreatedAt = e.Timestamp
			}
			if (e.OldValue == nil) != made {
				return wrong("oldValue does not say whether it was there")
			}
			if err := json.Unmarshal([]byte(*e.NewValue), &ns.meta); err != nil {
				return wrong("%v", err)
			}
		case "namespace.delete":
			if made || ns.keys > 0 || e.NewValue != nil {
				return wrong("%d keys, there already no more: %t", ns.keys, made)
			}
			ns.deleted = true
		default:
			return wrong("an unknown action")
		}
		if !slices.Equal(places, wantPlaces) {
			return wrong("places %x, want %x", places, wantPlaces)
		}
		return nil
	})
	if err != nil {
		return err
	}

	keys := 0
	err = tx.Bucket([]byte("config")).ForEach(func(k, v []byte) error {
		b, err := record("config", k, v, 17)
		if err != nil {
			return err
		}
		l := lives[string(k)]
		if l == nil {
			return fmt.Errorf("config %q: the trail does not have it", k)
		}
		keys++
		version := uint64(len(l.places))
		var wantPlaces []place
		for i := range bits.Len64(version) {
			wantPlaces = append(wantPlaces, l.places[version>>i<<i-1])
		}
		places, text, err := placesIn(b[16:])
		if err != nil {
			return fmt.Errorf("config %q: %w", k, err)
		}
		if u64(b) != l.entry.Revision || u64(b[8:]) != version || !slices.Equal(places, wantPlaces) {
			return fmt.Errorf("config %q: revision %d, version %d, places %x; want %d, %d, %x",
				k, u64(b), u64(b[8:]), places, l.entry.Revision, version, wantPlaces)
		}
		var e stored
		if err := json.Unmarshal(text, &e); err != nil {
			return fmt.Errorf("config %q: %w", k, err)
		}
		if diff := cmp.Diff(l.entry, e); diff != "" {
			return fmt.Errorf("config %q (-trail +config):\n%s", k, diff)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if keys != len(lives) {
		return fmt.Errorf("%d entries, the trail has %d", keys, len(lives))
	}

	found := map[string]*space{}
	err = tx.Bucket([]byte("namespaces")).ForEach(func(k, v []byte) error {
		b, err := record("namespaces", k, v, 27)
		if err != nil {
			return err
		}
		s := &space{deleted: b[0] == 1, keys: u64(b[1:]), rev: u64(b[9:]), last: place(b[17:27])}
		found[string(k)] = s
		if b[0] > 1 {
			return fmt.Errorf("namespace %s: flags %x", k, b[0])
		}
		return json.Unmarshal(b[27:], &s.meta)
	})
	if err != nil {
		return err
	}
	if diff := cmp.Diff(spaces, found, cmp.AllowUnexported(space{})); diff != "" {
		return fmt.Errorf("namespaces (-trail +namespaces):\n%s", diff)
	}

	meta := map[string]string{}
	err = tx.Bucket([]byte("meta")).ForEach(func(k, v []byte) (err error) {
		if string(k) != "format" { // it alone has no checksum, whatever version it says
			v, err = record("meta", k, v, 0)
		}
		meta[string(k)] = hex.EncodeToString(v)
		return err
	})
	if err != nil {
		return err
	}
	if meta["format"] != "00000001" {
		return fmt.Errorf("meta: format %s", meta["format"])
	}
	if len(meta) == 1 && rev == 0 {
		return nil // nothing was applied yet
	}
	nanos := int64(0)
	if rev > 0 {
		when, err := time.Parse("2006-01-02T15:04:05.000000000Z", last)
		if err != nil {
			return err
		}
		nanos = when.UnixNano()
	}
	want := map[string]string{
		"format": "00000001", "applied": meta["applied"],
		"revision": fmt.Sprintf("%016x", rev), "time": fmt.Sprintf("%016x", nanos), "hash": hash,
		"events": fmt.Sprintf("%016x%016x", events, rev),
	}
	if meta["events"] == "" {
		delete(want, "events") // of a program that did not count them, see openStore
	}
	if diff := cmp.Diff(want, meta); diff != "" || len(meta["applied"]) != 16 {
		return fmt.Errorf("meta (-trail +meta):\n%s", diff)
	}
	return nil
}

// TestFindVersion: every earlier version of a key's present life is found, for every
// number of versions, and nothing of the life before.
func TestFindVersion(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	most := 300
	if testing.Short() {
		most = 70 // past 64, so that every place of an entry is used and replaced
	}
	value := func(life, version int) string { return fmt.Sprintf("life %d version %d", life, version) }
	for life := 1; life <= 2; life++ {
		for version := 1; version <= most; version++ {
			// Another key and a longer name beside it keep neighbours from being taken for it.
			w.apply(set("app", "k", value(life, version)), set("app", "kk", value(life, -version)))
			err := w.st.view(func(tx *bbolt.Tx) error {
				e, ok, err := getEntry(tx, entryKey("app", "k"))
				if err != nil || !ok || e.version != uint64(version) {
					return fmt.Errorf("entry %+v, %t, %w", e, ok, err)
				}
				for want := 1; want <= version; want++ {
					rec, err := findVersion(tx, e, uint64(want))
					if err != nil {
						return fmt.Errorf("version %d of %d: %w", want, version, err)
					}
					ev, err := rec.decode()
					if err != nil {
						return err
					}
					if ev.Version != uint64(want) || ev.Key != "k" || *ev.NewValue != value(life, want) {
						return fmt.Errorf("version %d of %d: found %+v", want, version, ev)
					}
				}
				return nil
			})
			if err != nil {
				t.Fatalf("life %d: %v", life, err)
			}
		}
		w.check()
		w.apply(unset("app", "k"))
	}
}

// TestFindVersionTrimmed: where the trail was trimmed, versions are found or are
// errTrimmed, and never another version.
func TestFindVersionTrimmed(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	const versions, kept = 100, 41
	for v := range versions {
		w.apply(set("app", "k", fmt.Sprint(v+1)))
	}
	w.apply(&command{Op: "trim", Trim: &trimming{Rev: kept - 1, Events: kept - 1}}) // here version and revision are the same
	err := w.st.db.Update(func(tx *bbolt.Tx) error {
		e, _, err := getEntry(tx, entryKey("app", "k"))
		if err != nil {
			return err
		}
		for v := uint64(1); v <= versions; v++ {
			rec, err := findVersion(tx, e, v)
			switch {
			case v < kept && errors.Is(err, errTrimmed):
			case err != nil || v < kept:
				t.Errorf("version %d: %s, %v", v, rec.json, err)
			case !bytes.Contains(rec.json, fmt.Appendf(nil, `,"version":%d,`, v)):
				t.Errorf("version %d: %s", v, rec.json)
			}
		}
		// What is not there and was not trimmed was lost.
		err = tx.Bucket([]byte("trail")).Delete(place{64, 0}.appendTo(nil))
		if _, lost := findVersion(tx, e, 64); !errors.Is(lost, errCorrupt) {
			t.Errorf("version 64, which was lost: %v", lost)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestCorrupt: one changed byte anywhere in a record, or a record at another key, is
// errCorrupt to whoever reads it, and a command that meets it is not applied.
func TestCorrupt(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"), set("app", "k", "w"))
	read := map[string]func(tx *bbolt.Tx, key []byte) error{
		"config":     func(tx *bbolt.Tx, key []byte) error { _, _, err := getEntry(tx, key); return err },
		"trail":      func(tx *bbolt.Tx, key []byte) error { _, _, err := getEvent(tx, placeAt(key)); return err },
		"namespaces": func(tx *bbolt.Tx, key []byte) error { _, err := getNamespace(tx, string(key)); return err },
	}
	keys := map[string][]byte{"config": []byte("app\x00k"), "trail": {0, 0, 0, 0, 0, 0, 0, 2, 0, 0}, "namespaces": []byte("app")}
	others := map[string][]byte{"config": []byte("app\x00l"), "trail": {0, 0, 0, 0, 0, 0, 0, 3, 0, 0}, "namespaces": []byte("apq")}
	for bucket, key := range keys {
		tx, err := w.st.db.Begin(true)
		if err != nil {
			t.Fatal(err)
		}
		b := tx.Bucket([]byte(bucket))
		whole := bytes.Clone(b.Get(key))
		if err := read[bucket](tx, key); err != nil {
			t.Errorf("%s: %v", bucket, err)
		}
		put := func(key, rec []byte) {
			if err := b.Put(key, rec); err != nil {
				t.Fatal(err)
			}
		}
		for i := range whole {
			bad := bytes.Clone(whole)
			bad[i] ^= 1
			put(key, bad)
			if err := read[bucket](tx, key); !errors.Is(err, errCorrupt) {
				t.Errorf("%s, byte %d changed: %v", bucket, i, err)
			}
		}
		for _, short := range []int{0, 3, 4, len(whole) - 1} {
			put(key, whole[:short])
			if err := read[bucket](tx, key); !errors.Is(err, errCorrupt) {
				t.Errorf("%s, cut to %d bytes: %v", bucket, short, err)
			}
		}
		put(others[bucket], whole)
		if err := read[bucket](tx, others[bucket]); !errors.Is(err, errCorrupt) {
			t.Errorf("%s, at another key: %v", bucket, err)
		}
		if err := tx.Rollback(); err != nil {
			t.Fatal(err)
		}
	}

	err := w.st.db.Update(func(tx *bbolt.Tx) error {
		rec := bytes.Clone(tx.Bucket([]byte("config")).Get(keys["config"]))
		rec[len(rec)-3] ^= 1
		return tx.Bucket([]byte("config")).Put(keys["config"], rec)
	})
	if err != nil {
		t.Fatal(err)
	}
	before := *w.st.at()
	if out, err := w.st.apply(w.entries(set("app", "other", "v"), set("app", "k", "x"))); !errors.Is(err, errCorrupt) {
		t.Errorf("a batch that meets it gives %v, %v", out, err)
	}
	if *w.st.at() != before {
		t.Errorf("the batch moved the store from %+v to %+v", before, *w.st.at())
	}
	bad := w.entries(set("app", "l", "v"))[0]
	bad.Data[len(bad.Data)-2] ^= 1
	if _, err := w.st.apply([]*raft.Log{bad}); !errors.Is(err, errCorrupt) {
		t.Errorf("a command with a changed byte gives %v", err)
	}
}

// TestOpenStore: the state file is kept after a clean stop and after a killed process,
// and removed when it may have missed what the machine forgot.
func TestOpenStore(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		end  func(t *testing.T, st *store, mark string)
		how  string
		keep bool
	}{
		{"clean stop", func(t *testing.T, st *store, mark string) {
			if err := st.Close(); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(mark); string(b) != "clean\n" {
				t.Errorf("the mark says %q, %v", b, err)
			}
		}, "kept after a clean stop", true},
		{"killed", func(t *testing.T, st *store, mark string) {}, "kept after a killed process", true},
		{"another boot", func(t *testing.T, st *store, mark string) {
			now, err := os.ReadFile(mark)
			if err != nil {
				t.Fatal(err)
			}
			f := strings.Fields(string(now))
			f[1] = "00000000-0000-4000-8000-000000000000"
			overwrite(t, mark, strings.Join(f, " ")+"\n")
		}, "rebuilding after an unclean stop", false},
		{"another mount", func(t *testing.T, st *store, mark string) {
			now, err := os.ReadFile(mark)
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, mark, strings.Replace(string(now), " mount ", " mount 9", 1))
		}, "rebuilding after an unclean stop", false},
		{"mark lost", func(t *testing.T, st *store, mark string) {
			if err := os.Remove(mark); err != nil {
				t.Fatal(err)
			}
		}, "rebuilding after an unclean stop", false},
		{"mark cut", func(t *testing.T, st *store, mark string) { overwrite(t, mark, "clean") }, "rebuilding after an unclean stop", false},
		{"file lost", func(t *testing.T, st *store, mark string) {
			if err := os.Remove(filepath.Join(filepath.Dir(mark), "state.db")); err != nil {
				t.Fatal(err)
			}
		}, "new", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			mark := filepath.Join(dir, "state.mark")
			w := newWriter(t, dir)
			w.apply(set("app", "k", "v"))
			inUse, err := os.ReadFile(mark)
			if err != nil || string(inUse) == "clean\n" {
				t.Errorf("in use the mark says %q, %v", inUse, err)
			}
			w.st.db.Close() // what is left of a process that ended: the kernel has its pages and not its locks
			if tt.how == "kept after a clean stop" {
				w = newWriter(t, dir)
			}
			tt.end(t, w.st, mark)

			st, how, err := openStore(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer st.db.Close()
			if how != tt.how {
				t.Errorf("opened %q, want %q", how, tt.how)
			}
			if rev := st.at().rev; (rev == 1) != tt.keep || rev > 1 {
				t.Errorf("opened at revision %d", rev)
			}
			if again, err := os.ReadFile(mark); err != nil || !bytes.Equal(again, inUse) {
				t.Errorf("the mark says %q, want %q (%v)", again, inUse, err)
			}
		})
	}
}

func overwrite(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestOpenStoreRefuses: a file of another format, and one whose position or newest events
// are not what was written, is named in the error and keeps what it holds.
func TestOpenStoreRefuses(t *testing.T) {
	t.Parallel()
	put := func(bucket string, key []byte, spoil func(rec []byte) []byte) func(tx *bbolt.Tx) error {
		return func(tx *bbolt.Tx) error {
			b := tx.Bucket([]byte(bucket))
			return b.Put(key, spoil(bytes.Clone(b.Get(key))))
		}
	}
	flip := func(i int) func([]byte) []byte {
		return func(rec []byte) []byte { rec[(i+len(rec))%len(rec)] ^= 1; return rec }
	}
	// sealed changes a byte and makes the checksum right, as somebody would who wants it unseen.
	sealed := func(key []byte, i int) func([]byte) []byte {
		return func(rec []byte) []byte { rec = flip(i)(rec); return append(crcOf(key, rec[4:]), rec[4:]...) }
	}
	second, last := []byte{0, 0, 0, 0, 0, 0, 0, 2, 0, 0}, []byte{0, 0, 0, 0, 0, 0, 0, 4, 0, 0}
	for name, tt := range map[string]struct {
		spoil   func(tx *bbolt.Tx) error
		corrupt bool
	}{
		"newer format":    {put("meta", []byte("format"), func([]byte) []byte { return []byte{0, 0, 0, 3} }), false},
		"no format":       {func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Delete([]byte("format")) }, false},
		"a cut, lost":     {put("meta", []byte("format"), func([]byte) []byte { return []byte{0, 0, 0, 2} }), true},
		"events":          {put("meta", []byte("events"), flip(5)), true},
		"first event":     {func(tx *bbolt.Tx) error { return tx.Bucket([]byte("trail")).Delete(place{1, 0}.appendTo(nil)) }, true},
		"applied":         {put("meta", []byte("applied"), flip(-1)), true},
		"revision":        {put("meta", []byte("revision"), flip(5)), true},
		"time":            {put("meta", []byte("time"), flip(0)), true},
		"hash":            {put("meta", []byte("hash"), flip(-1)), true},
		"hash, sealed":    {put("meta", []byte("hash"), sealed([]byte("hash"), -1)), true},
		"position cut":    {put("meta", []byte("revision"), func(rec []byte) []byte { return rec[:11] }), true},
		"event":           {put("trail", second, flip(-90)), true},
		"event, sealed":   {put("trail", second, sealed(second, -90)), true},
		"event lost":      {func(tx *bbolt.Tx) error { return tx.Bucket([]byte("trail")).Delete(second) }, true},
		"last event lost": {func(tx *bbolt.Tx) error { return tx.Bucket([]byte("trail")).Delete(last) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			w := newWriter(t, dir)
			w.apply(set("app", "k", "v"), set("app", "k", "w"), set("app", "l", "v"), set("app", "k", "x"))
			if err := w.st.db.Update(tt.spoil); err != nil {
				t.Fatal(err)
			}
			if err := w.st.Close(); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "state.db")
			_, _, err := openStore(dir)
			if err == nil || !strings.Contains(err.Error(), path) || errors.Is(err, errCorrupt) != tt.corrupt {
				t.Errorf("opened with %v", err)
			}
			db, err := openDB(path)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			err = db.View(func(tx *bbolt.Tx) error {
				_, ok, err := getEntry(tx, entryKey("app", "k"))
				if !ok {
					t.Error("the file has lost its entry")
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// snapshotOf writes a snapshot as raft does.
func snapshotOf(tb testing.TB, st *store) *bytes.Buffer {
	tb.Helper()
	f := &fsm{store: st, log: slog.New(slog.DiscardHandler), halt: func(err error) { tb.Fatal(err) }}
	snap, err := f.Snapshot()
	if err != nil {
		tb.Fatal(err)
	}
	defer snap.Release()
	sink := &memorySink{}
	if err := snap.Persist(sink); err != nil || !sink.closed {
		tb.Fatalf("persist: %v, closed %t", err, sink.closed)
	}
	return &sink.Buffer
}

// A memorySink is a raft.SnapshotSink.
type memorySink struct {
	bytes.Buffer
	closed bool
}

func (s *memorySink) ID() string    { return "in memory" }
func (s *memorySink) Close() error  { s.closed = true; return nil }
func (s *memorySink) Cancel() error { s.closed = false; return nil }

// TestReplace: a snapshot becomes the state, also on the disk; who was reading goes on
// reading the old one; what is no snapshot changes nothing.
func TestReplace(t *testing.T) {
	t.Parallel()
	from := newWriter(t, t.TempDir())
	from.apply(set("app", "k", "v"), set("other", "k", "v"))
	snap, then := snapshotOf(t, from.st).Bytes(), *from.st.at()
	from.apply(set("app", "k", "later"))

	dir := t.TempDir()
	to := newWriter(t, dir)
	to.apply(set("mine", "k", "v"))
	own := *to.st.at()
	for name, bad := range map[string][]byte{"nothing": nil, "text": bytes.Repeat([]byte("state"), 10_000), "half": snap[:4096]} {
		if err := to.st.replace(bytes.NewReader(bad)); err == nil || *to.st.at() != own {
			t.Errorf("restoring %s: %v, at %+v", name, err, *to.st.at())
		}
		to.check()
	}
	broken := io.MultiReader(bytes.NewReader(snap[:8192]), brokenReader{})
	if err := to.st.replace(broken); !errors.Is(err, io.ErrClosedPipe) || *to.st.at() != own {
		t.Errorf("restoring from a reader that breaks: %v, at %+v", err, *to.st.at())
	}

	reading, err := to.st.begin()
	if err != nil {
		t.Fatal(err)
	}
	bell := to.st.changed.wait()
	if err := to.st.replace(bytes.NewReader(snap)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-bell:
	default:
		t.Error("the bell did not ring")
	}
	if _, ok, err := getEntry(reading, entryKey("mine", "k")); !ok || err != nil {
		t.Errorf("the reader has lost its state: %t, %v", ok, err)
	}
	reading.Rollback()
	if *to.st.at() != then {
		t.Errorf("at %+v, want %+v", *to.st.at(), then)
	}
	to.check()
	same(t, from, to, false)
	to.index, to.now = from.index-1, from.now-int64(time.Second)
	to.apply(set("app", "k", "later"))
	same(t, from, to, true)

	if err := to.st.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if f.Name() != "state.db" && f.Name() != "state.mark" {
			t.Errorf("%s is left", f.Name())
		}
	}
	same(t, from, newWriter(t, dir), true)
}

// A brokenReader fails.
type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrClosedPipe }

// same says whether two stores are equal, bucket by bucket.
func same(t *testing.T, a, b *writer, want bool) {
	t.Helper()
	err := a.st.view(func(ta *bbolt.Tx) error {
		return b.st.view(func(tb *bbolt.Tx) error { return diffBuckets("", ta, tb) })
	})
	if (err == nil) != want {
		t.Errorf("the states are equal: %t (%v)", err == nil, err)
	}
}

// stateV1 makes the state of testdata/state-v1.db: every kind of event, a key with a
// former life, one with many versions, a namespace that is deleted and one made again.
func stateV1(w *writer) {
	value := func(s string) *string { return &s }
	op := func(c *command) *command { c.Actor, c.Source, c.ID = "ops@test", "::1", "v1"; return c }
	cmds := []*command{
		op(&command{Op: "describe", NS: "billing", Meta: &nsMeta{Description: "Rechnungen \u2014 \"live\"\n", Owner: "team-b"}}),
		op(&command{Op: "patch", NS: "billing", Changes: []change{
			{Key: "db/primary/host", Value: value("10.0.0.1"), Type: "string"},
			{Key: "limits", Value: value(`{ "max": 1e3 }`), Type: "json"},
			{Key: "on", Value: value("true"), Type: "bool"},
			{Key: "zahl \u00fc", Value: value("-1.50"), Type: "number"},
		}}),
		unset("billing", "on"),
		set("billing", "on", "\x00\x1f\x7f\u2028\U0001f600<&>\\\""),
		op(&command{Op: "describe", NS: "empty", Meta: &nsMeta{Owner: "team-e"}}),
		op(&command{Op: "drop", NS: "empty"}),
		set("again", "k", "v"), unset("again", "k"), op(&command{Op: "drop", NS: "again"}), set("again", "k", "w"),
	}
	for v := range 9 {
		cmds = append(cmds, set("many", "versions", fmt.Sprint("v", v+1)))
	}
	w.apply(cmds...)
}

// TestGrowsUnderReader: a reader who takes his time stops no writer and no other reader, however much
// the file grows meanwhile: its map has room from the beginning.
func TestGrowsUnderReader(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	tx, err := w.st.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	value := strings.Repeat("x", 1<<20)
	logs := w.entries(set("app", "a", value), set("app", "b", value), set("app", "c", value), set("app", "d", value))
	wrote := make(chan error, 1)
	go func() {
		_, err := w.st.apply(logs)
		wrote <- errors.Join(err, w.st.view(func(*bbolt.Tx) error { return nil }))
	}()
	select {
	case err = <-wrote:
	case <-time.After(limit(20 * time.Second)): // for milliseconds of work
		t.Error("a reader holds up a writer")
		tx.Rollback() // or nothing of it would end
		err = <-wrote
	}
	if err != nil {
		t.Fatal(err)
	}
	w.check()
}

// TestAllDeleted: a transaction that removes every key, of many pages, goes on.
func TestAllDeleted(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	value, all, none := strings.Repeat("v", 100), &command{Op: "patch", NS: "app"}, &command{Op: "patch", NS: "app"}
	for i := range 1000 {
		key := fmt.Sprintf("k%03d", i)
		all.Changes = append(all.Changes, change{Key: key, Value: &value, Type: "string"})
		none.Changes = append(none.Changes, change{Key: key})
	}
	w.apply(all)
	logs := w.entries(none, set("app", "zzz", "v"))
	// It takes milliseconds. A test that fails would wait for the transaction's end.
	late := time.AfterFunc(limit(20*time.Second), func() { panic("the transaction does not end") })
	defer late.Stop()
	if _, err := w.st.apply(logs); err != nil {
		t.Fatal(err)
	}
	w.check()
}

// TestStateV1: a state file that an earlier confman wrote, a snapshot in fact, is read,
// can be written to, and is still what the same commands make. go test -run StateV1
// -update writes the file; a format that was released is never written anew.
func TestStateV1(t *testing.T) {
	t.Parallel()
	const path = "testdata/state-v1.db"
	fresh := newWriter(t, t.TempDir())
	stateV1(fresh)
	if *update {
		if err := os.WriteFile(path, snapshotOf(t, fresh.st).Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	overwrite(t, filepath.Join(dir, "state.db"), string(old))
	overwrite(t, filepath.Join(dir, "state.mark"), "clean\n")
	w := newWriter(t, dir)
	w.check()
	if pos := *w.st.at(); pos != *fresh.st.at() || pos.rev != 19 || pos.index != 19 {
		t.Errorf("at %+v, want %+v", pos, *fresh.st.at())
	}
	// How many events there are was not noted then, and is with the first transaction.
	for _, w := range []*writer{fresh, w} {
		w.apply(unset("billing", "none"))
	}
	same(t, fresh, w, true)

	got := map[string]string{}
	err = w.st.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketConfig).ForEach(func(k, rec []byte) error {
			e, err := parseEntry(k, rec)
			if err != nil {
				return err
			}
			v, err := e.decode()
			got[v.Namespace+"/"+v.Key] = fmt.Sprintf("%s %d %s", v.Type, v.Version, v.Value)
			return err
		})
	})
	want := map[string]string{
		"billing/db/primary/host": "string 1 10.0.0.1",
		"billing/limits":          `json 1 { "max": 1e3 }`,
		"billing/on":              "string 1 \x00\x1f\x7f\u2028\U0001f600<&>\\\"",
		"billing/zahl \u00fc":     "number 1 -1.50",
		"again/k":                 "string 1 w",
		"many/versions":           "string 9 v9",
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("entries (-want +got):\n%s%v", diff, err)
	}
	err = w.st.view(func(tx *bbolt.Tx) error {
		for ns, want := range map[string]namespace{
			"billing": {keys: 4, rev: 4, last: place{4, 0}, nsMeta: nsMeta{Description: "Rechnungen \u2014 \"live\"\n", Owner: "team-b"}},
			"empty":   {deleted: true, rev: 6, last: place{6, 0}, nsMeta: nsMeta{Owner: "team-e"}},
			"again":   {keys: 1, rev: 10, last: place{10, 0}, nsMeta: nsMeta{Owner: "ops@test"}},
		} {
			n, err := getNamespace(tx, ns)
			if err != nil {
				return err
			}
			want.CreatedAt = n.CreatedAt // checked by checkState
			if diff := cmp.Diff(want, *n, cmp.AllowUnexported(namespace{}, place{})); diff != "" {
				t.Errorf("namespace %s (-want +got):\n%s", ns, diff)
			}
		}
		e, _, err := getEntry(tx, entryKey("many", "versions"))
		if err != nil {
			return err
		}
		ev, err := findVersion(tx, e, 3)
		if !bytes.Contains(ev.json, []byte(`,"oldValue":"v2","newValue":"v3",`)) {
			t.Errorf("version 3: %s", ev.json)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if res := w.apply(set("many", "versions", "v10"))[0]; res.rev != 20 || res.err != nil {
		t.Errorf("a write afterwards: %+v", res)
	}
	w.check()
}

// stateV2 makes the state of testdata/state-v2.db: that of stateV1, and what could be done to it since
// then. Members come and go, a backup is restored, and of the trail the front is trimmed and half swept.
func stateV2(t *testing.T, w *writer) {
	stateV1(w)
	before := backupOf(t, w.st)
	node := func(id string, port int) *nodeRecord {
		return &nodeRecord{ID: id, Address: "10.0.0.1", APIPort: port, RaftPort: port + 1, Voter: id != "node3"}
	}
	known := []nodeRecord{*node("node1", 10)}
	known[0].Filed = true
	cmds := []*command{
		{Op: "member", Node: node("node2", 20), Known: known, Actor: "ops@test", ID: "v2"},
		{Op: "member", Node: node("node3", 30), Actor: "ops@test", ID: "v2"},
		{Op: "unmember", Node: &nodeRecord{ID: "node2"}, Actor: "ops@test", ID: "v2"},
		{Op: "lead", Node: &nodeRecord{ID: "node1"}, Actor: "ops@test", ID: "v2"},
		set("billing", "limits", "2"), set("extra", "k", "v"), unset("many", "versions"),
	}
	w.apply(append(cmds, restoreCommands(t, before, "v2")...)...)
	w.apply(w.trimOf(12))
	w.apply(&command{Op: "sweep", Trim: &trimming{Rev: 2, N: 1}})
	w.apply(set("many", "versions", "v10"))
}

// TestStateV2 is TestStateV1 for state-v2.db. backup-v1.backup is of the same state, as GET /api/v1/backup
// sends it, and is restored into an empty one.
func TestStateV2(t *testing.T) {
	t.Parallel()
	const path, backup = "testdata/state-v2.db", "testdata/backup-v1.backup"
	fresh := newWriter(t, t.TempDir())
	stateV2(t, fresh)
	if *update {
		for path, b := range map[string][]byte{path: snapshotOf(t, fresh.st).Bytes(), backup: backupOf(t, fresh.st)} {
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	dir := t.TempDir()
	for name, from := range map[string]string{"state.db": path, "given.backup": backup} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		overwrite(t, filepath.Join(dir, name), string(b))
	}
	overwrite(t, filepath.Join(dir, "state.mark"), "clean\n")
	w := newWriter(t, dir)
	sound := func(st *store) { // w.check knows no trims and no restores
		t.Helper()
		err := st.view(func(tx *bbolt.Tx) error { return errors.Join(checkRecords(tx), checkEntries(tx), checkChain(tx)) })
		if err != nil {
			t.Error(err)
		}
	}
	sound(w.st)
	same(t, fresh, w, true)
	if pos := *w.st.at(); pos != *fresh.st.at() || pos.rev != 29 || pos.cut.at != (place{12, 0}) {
		t.Errorf("at %+v, want %+v", pos, *fresh.st.at())
	}
	want := map[string]string{
		"billing/db/primary/host": "string 1 10.0.0.1", "billing/limits": `json 3 { "max": 1e3 }`, "again/k": "string 1 w", "many/versions": "string 2 v10",
		"billing/on": "string 1 \x00\x1f\x7f\u2028\U0001f600<&>\\\"", "billing/zahl \u00fc": "number 1 -1.50",
	}
	holds := func(what string, st *store, plain bool) {
		t.Helper()
		got := map[string]string{}
		err := st.view(func(tx *bbolt.Tx) error {
			for _, e := range recordsOf(t, tx) {
				version := strconv.FormatUint(e.Version, 10) + " "
				if plain {
					version = ""
				}
				got[e.Namespace+"/"+e.Key] = e.Type + " " + version + e.Value
			}
			return nil
		})
		if plain {
			for k, v := range want {
				typ, rest, _ := strings.Cut(v, " ")
				_, value, _ := strings.Cut(rest, " ")
				want[k] = typ + " " + value
			}
		}
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("entries of %s (-want +got):\n%s%v", what, diff, err)
		}
	}
	holds(path, w.st, false)
	err := w.st.view(func(tx *bbolt.Tx) error {
		members, err := readMembers(tx)
		if err != nil || len(members) != 3 || !members["node1"].Filed || !members["node2"].Removed || members["node3"].Voter {
			t.Errorf("members %+v (%v)", members, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	w.apply(set("many", "versions", "v11"))
	sound(w.st)

	b, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	empty := newWriter(t, t.TempDir())
	for _, res := range empty.apply(restoreCommands(t, b, "old")...) {
		if res.err != nil {
			t.Error(res.err)
		}
	}
	sound(empty.st)
	holds(backup, empty.st, true)
}
