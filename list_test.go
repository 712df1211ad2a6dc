package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
)

// TestPagesWhileOthersWrite reads every list page by page, on the leader and on a
// follower, while writers add, change and remove items between those that stay. What
// was there all the time is seen exactly once, and nothing is seen twice.
func TestPagesWhileOthersWrite(t *testing.T) {
	const stay = 200
	c := startCluster(t, 3)
	leader, follower := c.leader(), c.followers()[0]

	patch := map[string]string{}
	for i := range stay {
		patch[fmt.Sprintf("k/%03d", i)] = "stays"
	}
	body, err := json.Marshal(patch)
	if err != nil {
		t.Fatal(err)
	}
	if a := leader.ask(t, "PATCH", "/api/v1/config/paged", string(body)); a.status != 200 {
		t.Fatal(a)
	}
	for i := range stay / 10 {
		if a := leader.ask(t, "PUT", fmt.Sprintf("/api/v1/namespaces/n%02d", i), `{}`); a.status != 201 {
			t.Fatal(a)
		}
	}
	c.converge() // the follower has the items that stay

	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	writers, ctx := errgroup.WithContext(ctx)
	for range 2 {
		writers.Go(func() error { return churn(ctx, leader, stay) })
	}

	lists := []struct {
		path  string
		limit string
		name  func(item json.RawMessage) (string, error) // what an item is known by
	}{
		{"/api/v1/config/paged", "7", stringMember("key")},
		{"/api/v1/config/paged?prefix=k/", "31", stringMember("key")},
		{"/api/v1/namespaces/paged/keys", "7", stringItem},
		{"/api/v1/namespaces", "3", stringMember("path")},
		{"/api/v1/audit/paged", "29", stringMember("id")},
		{"/api/v1/audit", "31", stringMember("id")},
		{"/api/v1/audit?key=k/000", "1", stringMember("id")},
	}
	for _, list := range lists {
		for _, n := range []*node{leader, follower} {
			t.Run(n.id+list.path, func(t *testing.T) {
				path, rawQuery, _ := strings.Cut(list.path, "?")
				query, err := url.ParseQuery(rawQuery)
				if err != nil {
					t.Fatal(err)
				}
				names := func(limit string) (all []string) {
					query.Set("limit", limit)
					for _, item := range n.items(t, path, query) {
						name, err := list.name(item)
						if err != nil {
							t.Fatalf("%v in %s", err, item)
						}
						all = append(all, name)
					}
					return all
				}
				stable := slices.DeleteFunc(names("1000"), func(name string) bool { return strings.HasSuffix(name, "-comes") })
				// Over and over, until there were enough writes for some to fall between pages.
				for begin := n.revision(t); n.revision(t) < begin+30 && ctx.Err() == nil && !t.Failed(); {
					checkSeen(t, stable, names(list.limit), strings.HasPrefix(path, "/api/v1/audit"))
				}
			})
		}
	}

	t.Run("text", func(t *testing.T) { // the same as lines, along the links
		var lines []string
		for next := "/api/v1/namespaces/paged/keys?limit=9"; next != ""; {
			a := follower.ask(t, "GET", next, "", "Accept", "text/plain")
			if a.status != 200 {
				t.Fatal(a)
			}
			lines = append(lines, strings.FieldsFunc(string(a.body), func(r rune) bool { return r == '\n' })...)
			link := a.header.Get("Link")
			next, _, _ = strings.Cut(strings.TrimPrefix(link, "<"), ">")
			if link != "" && link != "<"+next+`>; rel="next"` {
				t.Fatalf("Link is %q", link)
			}
		}
		var stable []string
		for i := range stay {
			stable = append(stable, fmt.Sprintf("k/%03d", i))
		}
		checkSeen(t, stable, lines, false)
	})

	stop()
	if err := writers.Wait(); err != nil {
		t.Error(err)
	}
}

// revision returns how far the node has come.
func (n *node) revision(t *testing.T) uint64 {
	t.Helper()
	_, st, err := n.status()
	if err != nil {
		t.Fatal(err)
	}
	return st.Revision
}

// stringItem is an item that is a JSON string.
func stringItem(item json.RawMessage) (s string, err error) {
	err = json.Unmarshal(item, &s)
	return s, err
}

// stringMember returns the function that reads a member of an item, a string.
func stringMember(name string) func(json.RawMessage) (string, error) {
	return func(item json.RawMessage) (string, error) {
		var m map[string]any
		if err := json.Unmarshal(item, &m); err != nil {
			return "", err
		}
		s, ok := m[name].(string)
		if !ok {
			return "", fmt.Errorf("no string %q", name)
		}
		return s, nil
	}
}

// checkSeen checks that each of stable is among seen exactly once, that nothing is
// there twice, and the order: that of the trail, newest first, or of the names.
func checkSeen(t *testing.T, stable, seen []string, trail bool) {
	t.Helper()
	count := map[string]int{}
	for i, name := range seen {
		if count[name]++; count[name] > 1 {
			t.Errorf("%q is seen twice", name)
		}
		if i == 0 {
			continue
		}
		ordered := seen[i-1] < name
		if trail {
			ordered = compareIDs(seen[i-1], name) > 0
		}
		if !ordered {
			t.Errorf("%q stands before %q", seen[i-1], name)
		}
	}
	for _, name := range stable {
		if count[name] != 1 {
			t.Errorf("%q was there all the time and is seen %d times", name, count[name])
		}
	}
}

// compareIDs compares the ids of two events, <revision>-<index>, by number.
func compareIDs(a, b string) int {
	var ar, ai, br, bi int
	fmt.Sscanf(a, "%d-%d", &ar, &ai) // what is no id is not in order either
	fmt.Sscanf(b, "%d-%d", &br, &bi)
	return slices.Compare([]int{ar, ai}, []int{br, bi})
}

// churn changes the keys that stay, makes and removes keys between them and namespaces
// between those that stay, until ctx ends.
func churn(ctx context.Context, n *node, stay int) error {
	for ctx.Err() == nil {
		i := rand.IntN(stay)
		method, target, body := "PUT", fmt.Sprintf("/api/v1/config/paged/k/%03d", i), fmt.Sprintf(`{"value":%d}`, rand.Int())
		switch rand.IntN(6) {
		case 0, 1:
			target += "-comes"
		case 2:
			method, target, body = "DELETE", target+"-comes", ""
		case 3:
			target, body = fmt.Sprintf("/api/v1/namespaces/n%02d-comes", i/10), `{}`
		case 4:
			method, target, body = "DELETE", fmt.Sprintf("/api/v1/namespaces/n%02d-comes", i/10), ""
		}
		a, err := doWith(following, method, n.url+target, adminKey, body)
		if err != nil {
			return err
		}
		if a.status >= 400 && a.status != 404 {
			return fmt.Errorf("%s %s: %v", method, target, a)
		}
	}
	return nil
}

// TestPatchKeys makes as many keys as one patch may, and one more.
func TestPatchKeys(t *testing.T) {
	const most = 10_000
	c := startCluster(t, 1)
	n := c.leader()
	patch := func(keys int) string {
		var b strings.Builder
		for i := range keys {
			fmt.Fprintf(&b, `,"k%05d":%d`, i, i)
		}
		return "{" + b.String()[1:] + "}"
	}
	if a := n.ask(t, "PATCH", "/api/v1/config/many", patch(most+1)); a.status != 413 || a.slug() != "too-large" {
		t.Errorf("%d keys: %v, want 413 too-large", most+1, a)
	}
	if a := n.ask(t, "GET", "/api/v1/config/many", ""); a.status != 404 {
		t.Errorf("after the refusal: %v, want 404", a)
	}
	a := n.ask(t, "PATCH", "/api/v1/config/many", patch(most))
	var done struct{ Revision, Changed uint64 }
	if err := json.Unmarshal(a.body, &done); err != nil || a.status != 200 || done.Revision != 1 || done.Changed != most {
		t.Fatalf("%d keys: %v, want revision 1 and all changed (%v)", most, a, err)
	}
	// All in one page, all in one revision, in byte order.
	for i, item := range n.items(t, "/api/v1/namespaces/many/keys", url.Values{"limit": {"10000"}}) {
		if key, err := stringItem(item); err != nil || key != fmt.Sprintf("k%05d", i) {
			t.Fatalf("key %d is %s", i, item)
		}
	}
	events := n.trail(t, "many")
	if len(events) != most {
		t.Fatalf("%d events, want %d", len(events), most)
	}
	for i, e := range events {
		if e.ID != fmt.Sprintf("1-%d", i) || e.Key != fmt.Sprintf("k%05d", i) {
			t.Fatalf("event %d is %s of key %s", i, e.ID, e.Key)
		}
	}
}

// TestPageEndsAtSize checks that a page of large entries ends early rather than grow
// beyond some 8 MiB, and that the pages hold everything all the same.
func TestPageEndsAtSize(t *testing.T) {
	const entries, size = 20, 1 << 20
	c := startCluster(t, 1)
	n := c.leader()
	value := strings.Repeat("v", size)
	for i := range entries {
		if a := n.ask(t, "PUT", fmt.Sprintf("/api/v1/config/large/k%02d?raw", i), value); a.status != 201 {
			t.Fatal(a)
		}
	}
	for _, list := range []string{"/api/v1/config/large", "/api/v1/audit/large", "/api/v1/audit"} {
		a := n.ask(t, "GET", list+"?limit=1000", "")
		var page struct {
			Items      []json.RawMessage
			Pagination struct{ HasMore bool }
		}
		if err := json.Unmarshal(a.body, &page); err != nil || a.status != 200 {
			t.Fatalf("%s: %v (%v)", list, a, err)
		}
		// The item that crosses the line may still be in the page.
		if len(a.body) > 8<<20+2*size || len(page.Items) == 0 || !page.Pagination.HasMore {
			t.Errorf("%s: a page of %d items and %d bytes, hasMore %v", list, len(page.Items), len(a.body), page.Pagination.HasMore)
		}
		if all := n.items(t, list, url.Values{"limit": {"1000"}}); len(all) != entries {
			t.Errorf("%s: %d items in all pages, want %d", list, len(all), entries)
		}
	}
}

// TestCursorOfAnotherList: a cursor shows nothing that its list does not hold, and is refused
// rather than taken for the end.
func TestCursorOfAnotherList(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("a", "k", "1"), set("b", "k", "1"), set("a", "k", "2"), set("b", "k", "2"), set("a", "k", "3"))
	s := newReader(t, w)
	get := func(path string) *answer {
		rec := httptest.NewRecorder()
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("X-API-Key", adminKey)
		s.ServeHTTP(rec, r)
		return &answer{rec.Code, rec.Header(), rec.Body.Bytes()}
	}
	next := func(path string) string {
		t.Helper()
		var page struct{ Pagination struct{ NextCursor string } }
		if a := get(path); json.Unmarshal(a.body, &page) != nil || page.Pagination.NextCursor == "" {
			t.Fatalf("GET %s: %v", path, a)
		}
		return page.Pagination.NextCursor
	}
	ofAll, ofA := next("/api/v1/audit?stale&limit=1"), next("/api/v1/audit/a?stale&limit=1")
	if a := get("/api/v1/audit/a?stale&cursor=" + ofA); a.status != http.StatusOK {
		t.Errorf("its own cursor: %v", a)
	}
	for _, path := range []string{"/api/v1/audit/a?stale&cursor=" + ofAll, "/api/v1/audit/b?stale&cursor=" + ofA,
		"/api/v1/namespaces?stale&cursor=" + ofA, "/api/v1/config/a?stale&cursor=" + ofA} {
		if a := get(path); a.status != http.StatusBadRequest {
			t.Errorf("GET %s: %v, want 400", path, a)
		}
	}
}

// TestFilterLooksFar: a page of filtered events ends where the list ends or the page is full, and
// not where a transaction does: what is settled by its correlation id is on the first page.
func TestFilterLooksFar(t *testing.T) {
	old := auditScan
	auditScan = 7
	defer func() { auditScan = old }()
	w := newWriter(t, t.TempDir())
	for i := range 100 {
		c := set([]string{"a", "b"}[i%2], "k", fmt.Sprint(i))
		c.ID = fmt.Sprintf("id-%d", i)
		w.apply(c)
	}
	s := newReader(t, w)
	for _, path := range []string{"/api/v1/audit?stale", "/api/v1/audit/a?stale"} {
		for _, m := range []struct {
			query string
			want  []string
			more  bool
		}{
			{"&correlationId=id-0", []string{"id-0"}, false},
			{"&correlationId=id-50", []string{"id-50"}, false},
			{"&correlationId=never", nil, false},
			{"&key=k&limit=1", []string{"id-99"}, true},
			{"&since=95&correlationId=id-0", nil, false},
		} {
			if path == "/api/v1/audit/a?stale" && m.more {
				m.want = []string{"id-98"}
			}
			rec := httptest.NewRecorder()
			r := httptest.NewRequest("GET", path+m.query, nil)
			r.Header.Set("X-API-Key", adminKey)
			s.ServeHTTP(rec, r)
			var page struct {
				Items      []eventDoc
				Pagination struct{ HasMore bool }
			}
			if err := json.Unmarshal(rec.Body.Bytes(), &page); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range page.Items {
				got = append(got, e.CorrelationID)
			}
			if fmt.Sprint(got) != fmt.Sprint(m.want) || page.Pagination.HasMore != m.more {
				t.Errorf("GET %s%s: %q, hasMore %v, want %q, %v", path, m.query, got, page.Pagination.HasMore, m.want, m.more)
			}
		}
	}
}
