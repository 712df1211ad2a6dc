package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wrongKey is nobody's.
const wrongKey = "cm_test_wrong_Qw8rTz4UiOp2AsDf"

// routeRoles restates who may use each route of the program, with a request that an
// admin is answered with status, on the leader, and the same for a thing that is not
// there. The requests run in this order, on one store.
var routeRoles = []struct {
	method, pattern string
	need            role
	target, missing string // paths
	body            string
	status          int
}{
	{"PUT", "/api/v1/config/{ns}/{key...}", admin, "/api/v1/config/roles/db/host", "/api/v1/config/none/k", `{"value":"v"}`, 201},
	{"PATCH", "/api/v1/config/{ns}", admin, "/api/v1/config/roles", "/api/v1/config/none", `{"k":"v"}`, 200},
	{"PUT", "/api/v1/namespaces/{ns}", admin, "/api/v1/namespaces/roles-2", "/api/v1/namespaces/none", `{}`, 201},
	{"GET", "/api/v1/config/{ns}/{key...}", reader, "/api/v1/config/roles/db/host", "/api/v1/config/none/k", "", 200},
	{"GET", "/api/v1/config/{ns}", reader, "/api/v1/config/roles", "/api/v1/config/none", "", 200},
	{"GET", "/api/v1/namespaces", reader, "/api/v1/namespaces", "", "", 200},
	{"GET", "/api/v1/namespaces/{ns}", reader, "/api/v1/namespaces/roles", "/api/v1/namespaces/none", "", 200},
	{"GET", "/api/v1/namespaces/{ns}/keys", reader, "/api/v1/namespaces/roles/keys", "/api/v1/namespaces/none/keys", "", 200},
	{"GET", "/api/v1/audit/{ns}", reader, "/api/v1/audit/roles", "/api/v1/audit/none", "", 200},
	{"GET", "/api/v1/audit", admin, "/api/v1/audit", "", "", 200},
	{"GET", "/api/v1/verify", admin, "/api/v1/verify", "", "", 200},
	{"GET", "/health", public, "/health", "", "", 200},
	{"GET", "/health/ready", public, "/health/ready", "", "", 200},
	{"DELETE", "/api/v1/config/{ns}/{key...}", admin, "/api/v1/config/roles/db/host", "/api/v1/config/none/k", "", 204},
	{"DELETE", "/api/v1/namespaces/{ns}", admin, "/api/v1/namespaces/roles-2", "/api/v1/namespaces/none", "", 204},
}

// TestRoles walks every route with no key, a wrong key, a reader and an admin, on a
// follower and on the leader. A route that is not in routeRoles fails it, so nobody
// adds one without saying here who may use it.
func TestRoles(t *testing.T) {
	said := map[string]role{}
	for _, rr := range routeRoles {
		said[rr.method+" "+rr.pattern] = rr.need
	}
	are := map[string]role{}
	for _, rt := range (&server{}).routes() {
		are[rt.method+" "+rt.pattern] = rt.role
	}
	if d := cmp.Diff(said, are); d != "" {
		t.Fatalf("roles of the routes (-routeRoles +routes):\n%s", d)
	}

	c := startCluster(t, 3, calm)
	leader, follower := c.leader(), c.followers()[0]
	var rev uint64 // of the last write, which the follower's reads wait for
	for _, rr := range routeRoles {
		writes := rr.method != "GET"
		until(t, 15*time.Second, func() error {
			if _, st, err := follower.status(); err != nil || st.Revision < rev {
				return fmt.Errorf("%s is at revision %d, not yet at %d (%v)", follower.id, st.Revision, rev, err)
			}
			return nil
		})
		for _, n := range []*node{follower, leader} { // a follower's refusals leave the leader something to do
			for _, who := range []struct {
				key  string
				role role
			}{{"", public}, {wrongKey, public}, {readerKey, reader}, {adminKey, admin}} {
				want := rr.status
				switch {
				case rr.need > public && who.role == public:
					want = http.StatusUnauthorized
				case who.role < rr.need:
					want = http.StatusForbidden
				case writes && n == follower:
					want = http.StatusTemporaryRedirect
				}
				methods := []string{rr.method}
				if rr.method == "GET" {
					methods = append(methods, "HEAD")
				}
				for _, method := range methods {
					a, err := do(method, n.url+rr.target, who.key, rr.body)
					if err != nil {
						t.Fatal(err)
					}
					if a.status != want {
						t.Errorf("%s %s on %s with key %q: %v, want %d", method, rr.target, n.id, who.key, a, want)
					}
				}
				if rr.missing != "" && (want == http.StatusUnauthorized || want == http.StatusForbidden) {
					sameRefusal(t, n, rr.method, rr.target, rr.missing, who.key, rr.body)
				}
			}
		}
		_, st, err := leader.status()
		if err != nil {
			t.Fatal(err)
		}
		rev = st.Revision
	}
}

// sameRefusal checks that the refusal of a request does not tell whether the thing
// that it is about exists.
func sameRefusal(t *testing.T, n *node, method, there, missing, key, body string) {
	t.Helper()
	var docs []map[string]any
	for _, target := range []string{there, missing} {
		doc := problemDoc(t, method, n.url+target, key, body)
		if doc["instance"] != target {
			t.Errorf("%s %s on %s: instance is %q", method, target, n.id, doc["instance"])
		}
		delete(doc, "instance")
		docs = append(docs, doc)
	}
	if d := cmp.Diff(docs[0], docs[1]); d != "" {
		t.Errorf("%s on %s with key %q tells what exists (-%s +%s):\n%s", method, n.id, key, there, missing, d)
	}
}

// problemDoc sends a request that is refused and returns the problem without its
// correlation id, which differs each time.
func problemDoc(t *testing.T, method, url, key, body string, headers ...string) map[string]any {
	t.Helper()
	a, err := do(method, url, key, body, headers...)
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(a.body, &doc); err != nil || a.slug() == "" {
		t.Fatalf("%s %s: %v, want a problem", method, url, a)
	}
	delete(doc, "correlationId")
	return doc
}

// TestWrongKeysAreAlike checks that the answer to a wrong key does not tell how wrong
// it is: all wrong keys get the same document.
func TestWrongKeysAreAlike(t *testing.T) {
	c := startCluster(t, 1)
	url := c.leader().url + "/api/v1/config/alike/k"
	want := problemDoc(t, "GET", url, wrongKey, "")
	for _, key := range []string{
		"x", adminKey[:len(adminKey)-1], adminKey + "x", adminKey[1:], strings.ToLower(adminKey), adminKey + " " + adminKey,
		adminKey + "\t" + readerKey, strings.Repeat("k", 10_000), "*", "null", `"` + adminKey + `"`,
	} {
		for _, doc := range []map[string]any{
			problemDoc(t, "GET", url, key, ""),
			problemDoc(t, "GET", url, "", "", "Authorization", "Bearer "+key),
		} {
			if d := cmp.Diff(want, doc); d != "" {
				t.Errorf("key %.60q (-another wrong key +this one):\n%s", key, d)
			}
		}
	}
}

// clusterSecret is what nodes share, where the configuration has a member for it.
const clusterSecret = "c5a1ee7f0b6d4938a2c4e6f8091b3d5f7a9cbedf1032547698badcfe10325476"

// withSecret sets it.
func withSecret(doc map[string]any) {
	if reflect.ValueOf(*defaults()).FieldByName("Cluster").FieldByName("Secret").IsValid() {
		with("Cluster", "Secret", clusterSecret)(doc)
	}
}

// TestSecretsStayOut sends keys and values in every place where they might be taken for something to
// report, through restarts, the loss of a majority and everything that a debugging log says, and looks
// for them in answers, logs, the list of processes, and for files that others can read.
func TestSecretsStayOut(t *testing.T) {
	t.Parallel()
	const value = "s3cr3t-value-of-a-key"
	secrets := []string{adminKey, readerKey, value, clusterSecret}
	c := newCluster(t, 3, withSecret)
	for _, n := range c.nodes {
		n.env = []string{"CONFMAN_DEBUG=1"}
	}
	c.nodes[2].args = append(c.nodes[2].args, "-log", "json")
	c.start()
	path := "/api/v1/config/secrets/k"
	near := adminKey + "-nearly" // a log that quotes what was sent holds the key too
	send := []struct {
		method, target, key, body string
		headers                   []string
	}{
		{"PUT", path, adminKey, `{"value":"` + value + `"}`, nil},
		{"PUT", path, adminKey, `{"value":"` + value + `","type":"number"}`, nil},
		{"PUT", path, adminKey, `{"value":"` + value + `","type":"json"}`, nil},
		{"PUT", path, adminKey, `{"value":"` + value + `"`, nil},
		{"PUT", path, adminKey, `{"value":"` + value + `"} ` + value, nil},
		{"PUT", path, adminKey, `{"value":` + value + `}`, nil},
		{"PUT", path, adminKey, `{"value":"` + value + `","other":"` + value + `"}`, nil},
		{"PUT", path, adminKey, `{"value":"` + value + `\ud800"}`, nil},
		{"PUT", path, adminKey, `{"value":"\ud800` + value + `"}`, nil},
		{"GET", "/api/v1/audit/secrets?" + adminKey, adminKey, "", nil},
		{"GET", "/api/v1/audit/secrets?limit=" + adminKey, adminKey, "", nil},
		{"GET", path + "?wait=" + adminKey, adminKey, "", nil},
		{"PUT", path + "?raw&type=bool", adminKey, value, nil},
		{"PUT", path + "?raw", adminKey, value + "\xff", nil},
		{"PUT", path, adminKey, `{"value":"` + value + `"}`, []string{"If-None-Match", "*"}},
		{"PATCH", "/api/v1/config/secrets", adminKey, `{"a":"` + value + `","b//c":"` + value + `"}`, nil},
		{"PATCH", "/api/v1/config/secrets", adminKey, `{"a":["` + value + `"],"b":}`, nil},
		{"PUT", path, readerKey, `{"value":"` + value + `"}`, nil},
		{"PUT", path, near, `{"value":"` + value + `"}`, nil},
		{"GET", path, "", "", []string{"Authorization", "Bearer " + adminKey + "x"}},
		{"GET", path, "", "", []string{"Authorization", "Basic " + adminKey}},
		{"GET", path, "", "", []string{"Authorization", adminKey}},
		{"GET", path + "?api_key=" + adminKey, readerKey, "", nil},
		{"GET", path + "?raw=" + readerKey, readerKey, "", nil},
		{"GET", path + "?raw=%zz" + readerKey, readerKey, "", nil},
		{"POST", path, adminKey, value, nil},
		{"GET", "/nowhere", near, "", nil},
		{"GET", "/api/v1/config//k", near, "", nil},
		{"DELETE", path, adminKey, "", []string{"If-Match", `"1"`, "X-Other", adminKey}},
	}
	// What stands where a name or a tag belongs is shown to who sent it, and to nobody else.
	named := len(send)
	send = append(send, []struct {
		method, target, key, body string
		headers                   []string
	}{
		{"PUT", path, adminKey, `{"value":{"` + value + `":1,"` + value + `":2}}`, nil},
		{"PUT", path, adminKey, `{"` + value + `":"v"}`, nil},
		{"PUT", path, adminKey, `{"value":"v","type":"` + value + ` "}`, nil},
		{"GET", path, adminKey, "", []string{"If-None-Match", value}},
	}...)
	for _, n := range c.nodes {
		for i, s := range send {
			id := fmt.Sprintf("secrets-%s-%d", n.id, i)
			a, err := do(s.method, n.url+s.target, s.key, s.body, append(slices.Clone(s.headers), "X-Correlation-Id", id)...)
			if err != nil {
				t.Fatal(err)
			}
			// A parameter's value stands in the answer to the client who sent it at most.
			for _, secret := range secrets {
				if a.status >= 300 && strings.Contains(string(a.body), secret) && !strings.Contains(s.target, secret) && i < named {
					t.Errorf("%s %s: the answer holds %q: %v", s.method, s.target, secret, a)
				}
			}
		}
	}
	for _, n := range c.nodes {
		last := fmt.Sprintf("secrets-%s-%d", n.id, len(send)-1)
		until(t, 5*time.Second, func() error {
			if !strings.Contains(n.logged(), last) {
				return fmt.Errorf("the log of %s has no line of request %s", n.id, last)
			}
			return nil
		})
	}

	// What others are told.
	for _, n := range c.nodes {
		for _, rr := range routeRoles {
			for _, key := range []string{"", wrongKey} {
				a, err := do(rr.method, n.url+strings.Replace(rr.target, "roles", "secrets", 1), key, rr.body)
				if err != nil {
					t.Fatal(err)
				}
				for _, secret := range secrets {
					if strings.Contains(fmt.Sprint(a.header, string(a.body)), secret) {
						t.Errorf("%s %s with key %q is told %q: %v", rr.method, rr.target, key, secret, a)
					}
				}
			}
		}
	}

	// What fails while a majority is missing, and what starts again behind that.
	stays := c.leader()
	for _, n := range c.nodes {
		if n != stays {
			n.kill()
		}
	}
	for range 2 {
		if a := stays.ask(t, "PUT", path+"?raw", value+"-lost", "X-Correlation-Id", "secrets-lost"); a.status < 500 {
			t.Errorf("without a majority: %v", a)
		}
	}
	for _, n := range c.nodes {
		if n != stays {
			n.start()
		}
	}
	c.ready()
	stays.stop()
	stays.start()
	c.ready()
	c.leader().put(t, "secrets", "k", value+"-again")
	c.converge()

	seen := func(where, text string) {
		for line := range strings.Lines(text) {
			for _, secret := range secrets {
				if strings.Contains(line, secret) {
					t.Errorf("%s holds %q: %.500s", where, secret, line)
				}
			}
		}
	}
	for _, n := range c.nodes {
		out, err := os.ReadFile(n.out)
		if err != nil {
			t.Fatal(err)
		}
		seen("the log of "+n.id, n.logged())
		seen("the output of "+n.id, string(out))
		for _, name := range []string{"cmdline", "environ", "comm", "status"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", n.cmd.Process.Pid, name))
			if err != nil && !errors.Is(err, fs.ErrPermission) { // whose environment nobody can read tells nobody
				t.Fatal(err)
			}
			seen(name+" of "+n.id, string(text))
		}
		if err := checkModes(n.data); err != nil {
			t.Error(err)
		}
	}
}

// TestAuthKeepsDigests checks that what a node holds to compare keys with, however it
// is printed, is not the keys.
func TestAuthKeepsDigests(t *testing.T) {
	keys := []apiKey{
		{Key: adminKey, Name: "Operators", Principal: "ops@test", Role: "admin"},
		{Key: readerKey, Name: "Service", Role: "reader"},
	}
	a := newAuth(keys)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		for _, v := range []any{a, *a, a.keys} {
			for _, k := range keys {
				if text := fmt.Sprintf(verb, v); strings.Contains(text, k.Key) {
					t.Errorf("%s of %T holds the key of %s", verb, v, k.Name)
				}
			}
		}
	}
	for _, tt := range []struct {
		header http.Header
		need   role
		who    string
		err    error
	}{
		{http.Header{}, public, "", nil},
		{http.Header{}, reader, "", errUnauthorized},
		{http.Header{"X-Api-Key": {adminKey}}, admin, "ops@test", nil},
		{http.Header{"X-Api-Key": {readerKey}}, reader, "Service", nil}, // no principal: the name
		{http.Header{"X-Api-Key": {readerKey}}, admin, "Service", errForbidden},
		{http.Header{"Authorization": {"Bearer " + adminKey}}, admin, "ops@test", nil},
		{http.Header{"Authorization": {"bearer " + adminKey}}, reader, "ops@test", nil},
		{http.Header{"Authorization": {"Basic " + adminKey}}, reader, "", errUnauthorized},
		{http.Header{"X-Api-Key": {wrongKey}, "Authorization": {"Bearer " + adminKey}}, reader, "", errUnauthorized},
		{http.Header{"X-Api-Key": {adminKey}, "Authorization": {"Bearer " + wrongKey}}, reader, "ops@test", nil},
	} {
		who, err := a.identify(&http.Request{Header: maps.Clone(tt.header)}, tt.need)
		kind := error(nil)
		if err != nil {
			kind = problemOf(err).kind
		}
		if kind != tt.err || tt.err == nil && who.principal != tt.who {
			t.Errorf("%v for role %d: %q, %v; want %q, %v", tt.header, tt.need, who.principal, err, tt.who, tt.err)
		}
	}
}
