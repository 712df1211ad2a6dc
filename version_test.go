package main

import (
	"encoding/json"
	"fmt"
	"testing"
)

// TestEveryVersion reads each of many versions of a key, over two lives of it. An
// earlier version is found through the trail by steps of powers of two, so every
// number up to a few of those matters.
func TestEveryVersion(t *testing.T) {
	const first, second = 70, 35
	c := startCluster(t, 1)
	n := c.leader()
	const path = "/api/v1/config/versions/k"
	write := func(life string, versions int) (made []string) {
		for v := 1; v <= versions; v++ {
			a := n.ask(t, "PUT", path, fmt.Sprintf(`{"value":"%s %d"}`, life, v))
			if a.status != 200 && a.status != 201 {
				t.Fatal(a)
			}
			made = append(made, string(a.body))
			n.put(t, "versions", "other", fmt.Sprint(life, v)) // its events lie between
		}
		return made
	}
	read := func(made []string) {
		t.Helper()
		for i, want := range made {
			a := n.ask(t, "GET", fmt.Sprintf("%s?version=%d", path, i+1), "")
			if a.status != 200 || string(a.body) != want {
				t.Errorf("version %d: %v, want what its write was answered with, %s", i+1, a, want)
				continue
			}
			var e entryDoc
			if err := json.Unmarshal(a.body, &e); err != nil || e.Version != uint64(i+1) {
				t.Errorf("version %d: %v (%v)", i+1, a, err)
			}
			if tag, want := a.header.Get("ETag"), fmt.Sprintf(`"%d"`, e.Revision); tag != want {
				t.Errorf("version %d: ETag %s, want %s", i+1, tag, want)
			}
		}
		for _, v := range []int{len(made) + 1, len(made) + 2, 2*len(made) + 1, 1 << 40} {
			if a := n.ask(t, "GET", fmt.Sprintf("%s?version=%d", path, v), ""); a.status != 404 {
				t.Errorf("version %d of %d: %v, want 404", v, len(made), a)
			}
		}
	}
	read(write("first", first))
	n.delete(t, "versions", "k")
	if a := n.ask(t, "GET", path+"?version=1", ""); a.status != 404 {
		t.Errorf("version 1 of a deleted key: %v, want 404", a)
	}
	read(write("second", second))
}
