package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// dataExample is the archive of a whole data directory, of a node that was stopped. Every release goes on
// reading it. Where a stored format changes, dataExample becomes a new name, go test -run DataExamples
// -update writes it, and the old one stays: it was written by the last commit that made it.
const dataExample = "testdata/data-v1.tar.gz"

// bigValue is large enough that a few of it bring a snapshot, and nothing in an archive.
var bigValue = strings.Repeat("x", 1<<20)

// TestDataExamples: a node starts on each data directory that an earlier confman left, reads all that is in
// it, and takes writes; and so it does where the state has to be made of snapshot and log.
func TestDataExamples(t *testing.T) {
	t.Parallel()
	if *update {
		writeDataExample(t)
	}
	archives, err := filepath.Glob("testdata/data-*.tar.gz")
	if err != nil || !slices.Contains(archives, dataExample) {
		t.Fatalf("%q, %v", archives, err)
	}
	for _, archive := range archives {
		for _, how := range []string{"kept after a clean stop", "new"} {
			c := newCluster(t, 1, addKey(exampleAdminKey, "example", "admin"))
			n := c.nodes[0]
			unpack(t, archive, n.data)
			own := &config{keyIn: "admin.key"}
			if made, err := own.ownKey(n.data); made || err != nil || own.Auth.ApiKeys[0].Key != exampleAdminKey {
				t.Errorf("%s: admin.key: %v, %v", archive, made, err)
			}
			if how == "new" {
				if err := errors.Join(os.Remove(filepath.Join(n.data, "state.db")), os.Remove(filepath.Join(n.data, "state.mark"))); err != nil {
					t.Fatal(err)
				}
			}
			c.start()
			names(t, n.logged(), fmt.Sprintf(`msg="state opened" node=node1 how=%s`, quoted(how)))
			readExample(t, n)
			n.put(t, "app", "after", "v")
			c.finish() // checks the trail
		}
	}
}

const exampleAdminKey = "cm_example_of_the_admin_key_of_a_node_without_a_file"

// example is what writeDataExample writes, key by key and value by value. A value that is there already is no
// version, and is in the log all the same.
var example = [][2]string{{"a", "first"}, {"b/c", "ä \x00 \u2028"}, {"big", bigValue}, {"big", bigValue}, {"big", bigValue}, {"big", bigValue}, {"big", bigValue}, {"a", "behind the snapshot"}}

func writeDataExample(t *testing.T) {
	c := newCluster(t, 1)
	n := c.nodes[0]
	if err := os.MkdirAll(n.data, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(n.data, "admin.key"), []byte(exampleAdminKey+"\n"))
	c.start()
	for _, e := range example[:len(example)-1] {
		n.put(t, "app", e[0], e[1])
	}
	n.put(t, "gone", "k", "v")
	n.delete(t, "gone", "k")
	n.write(t, "PUT", "/api/v1/namespaces/app", `{"description":"an example"}`)
	until(t, 20*time.Second, func() error {
		if found, _ := filepath.Glob(filepath.Join(n.data, "snapshots", "*", "meta.sum")); found == nil {
			return errors.New("no snapshot yet")
		}
		return nil
	})
	last := example[len(example)-1]
	n.put(t, "app", last[0], last[1])
	c.finish()
	var to bytes.Buffer
	zip, err := gzip.NewWriterLevel(&to, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(zip)
	if err := errors.Join(w.AddFS(os.DirFS(n.data)), w.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dataExample, to.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// readExample expects what writeDataExample wrote.
func readExample(t *testing.T, n *node) {
	t.Helper()
	latest, versions := map[string]string{}, map[string]int{}
	events := 3 // of another namespace, and of this one's description
	for _, e := range example {
		if latest[e[0]] == e[1] {
			continue
		}
		events++
		latest[e[0]] = e[1]
		versions[e[0]]++
		a := n.ask(t, "GET", fmt.Sprintf("%s?raw&version=%d", keyPath("app", e[0]), versions[e[0]]), "")
		if a.status != 200 || string(a.body) != e[1] {
			t.Errorf("version %d of %s: %v", versions[e[0]], e[0], a)
		}
	}
	for key, value := range latest {
		if e := n.get(t, "app", key); e.Value != value || e.Version != uint64(versions[key]) {
			t.Errorf("%s is at version %d, %.100q, want %d, %.100q", key, e.Version, e.Value, versions[key], value)
		}
	}
	if a := n.ask(t, "GET", "/api/v1/config/gone/k", ""); a.status != 404 {
		t.Errorf("a deleted key: %v", a)
	}
	if a := n.ask(t, "GET", "/api/v1/namespaces/app", ""); !strings.Contains(string(a.body), `"description":"an example"`) {
		t.Errorf("the namespace: %v", a)
	}
	want := fmt.Sprintf(`{"ok":true,"events":%d,"first":"1-0",`, events)
	if a := n.ask(t, "GET", "/api/v1/verify", ""); !strings.HasPrefix(string(a.body), want) {
		t.Errorf("verify: %v, want %s", a, want)
	}
}

// unpack makes dir of an archive.
func unpack(t *testing.T, archive, dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		at := filepath.Join(dir, h.Name)
		if err == nil && h.FileInfo().IsDir() {
			err = os.MkdirAll(at, 0o700)
		} else if err == nil {
			err = os.MkdirAll(filepath.Dir(at), 0o700)
			var b []byte
			if err == nil {
				b, err = io.ReadAll(r)
			}
			if err == nil {
				err = os.WriteFile(at, b, 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestManualFiles: the files of a data directory are those of the manual's chapter FILES, and the reverse.
// Of those that a killed process leaves, the program must know the name.
func TestManualFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	unpack(t, dataExample, dir)
	there, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, d := range there {
		want = append(want, d.Name())
	}
	for _, r := range rows(chapter(t, "FILES"), "`.*`.*") {
		for name := range strings.SplitSeq(r[0], ", ") {
			name = strings.Trim(name, "`/")
			if strings.HasPrefix(r[1], "Left by a process that was killed") {
				writeFile(t, filepath.Join(dir, name), nil)
				if err := removeTemporary(dir); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
					t.Errorf("%s is not removed at the start (%v)", name, err)
				}
				continue
			}
			// What is there for a while only, the program must name.
			if strings.HasPrefix(r[1], "There while") && strings.Contains(sources(t, false), strconv.Quote(name)) {
				continue
			}
			got = append(got, name)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-directory +manual):\n%s", diff)
	}
}

// quoted is a value as the log shows it.
func quoted(s string) string {
	if strings.Contains(s, " ") {
		return fmt.Sprintf("%q", s)
	}
	return s
}
