package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wrongKey is nobody's.
const wrongKey = "cm_test_wrong_Qw8rTz4UiOp2AsDf"

// The keys of TestMatrix beside the ones that every cluster knows.
const (
	limitedReaderKey = "cm_test_limited_reader_Wn5uYc2"
	limitedAdminKey  = "cm_test_limited_admin_Gk8eRp4d"
	expiredKey       = "cm_test_expired_Tq1sVb7mXz0hLa"
	revokedKey       = "cm_test_revoked_Jf6wDo3iNy9kUe"
)

// callers are the columns of the matrix. The limited keys are for the namespaces roles and roles-*.
var callers = []struct {
	name, key string
	ns        string // what it asks for; namespaces that begin with none are not there
}{
	{"nobody", "", "roles"},
	{"wrong", wrongKey, "roles"},
	{"expired", expiredKey, "roles"},
	{"revoked", revokedKey, "roles"},
	{"reader", readerKey, "roles"},
	{"admin", adminKey, "roles"},
	{"limited reader", limitedReaderKey, "roles"},
	{"limited reader outside", limitedReaderKey, "others"},
	{"limited admin", limitedAdminKey, "roles"},
	{"limited admin outside", limitedAdminKey, "others"},
}

// matrix restates who may use each route of the program. A cell is what one of the callers, in their
// order, is answered: 1 is 401, 3 is 403 and + is status, but 307 where a follower is asked for a
// write. In a target NS is a namespace and WHO the caller, so that writes do not meet.
// The requests run in this order, on one store.
var matrix = []struct {
	method, pattern string
	cells           string
	target, body    string
	status          int
}{
	{"PUT", "/api/v1/config/{ns}/{key...}", "1111 3+ 33 +3", "/api/v1/config/NS/db/WHO", `{"value":"v"}`, 201},
	{"PATCH", "/api/v1/config/{ns}", "1111 3+ 33 +3", "/api/v1/config/NS", `{"k":"v"}`, 200},
	{"PUT", "/api/v1/namespaces/{ns}", "1111 3+ 33 +3", "/api/v1/namespaces/NS-WHO", `{}`, 201},
	{"GET", "/api/v1/config/{ns}/{key...}", "1111 ++ +3 +3", "/api/v1/config/NS/k", "", 200},
	{"GET", "/api/v1/config/{ns}", "1111 ++ +3 +3", "/api/v1/config/NS", "", 200},
	{"GET", "/api/v1/namespaces", "1111 ++ ++ ++", "/api/v1/namespaces", "", 200},
	{"GET", "/api/v1/namespaces/{ns}", "1111 ++ +3 +3", "/api/v1/namespaces/NS", "", 200},
	{"GET", "/api/v1/namespaces/{ns}/keys", "1111 ++ +3 +3", "/api/v1/namespaces/NS/keys", "", 200},
	{"GET", "/api/v1/audit/{ns}", "1111 ++ +3 +3", "/api/v1/audit/NS", "", 200},
	{"GET", "/api/v1/audit", "1111 3+ 33 33", "/api/v1/audit", "", 200},
	{"GET", "/api/v1/verify", "1111 3+ 33 33", "/api/v1/verify", "", 200},
	{"GET", "/api/v1/cluster", "1111 ++ ++ ++", "/api/v1/cluster", "", 200},
	{"PUT", "/api/v1/cluster/nodes/{id}", "1111 3+ 33 33", "/api/v1/cluster/nodes/none", "{}", 400},
	{"DELETE", "/api/v1/cluster/nodes/{id}", "1111 3+ 33 33", "/api/v1/cluster/nodes/none", "", 404},
	{"POST", "/api/v1/cluster/leader", "1111 3+ 33 33", "/api/v1/cluster/leader", `{"node":"none"}`, 404},
	{"GET", "/api/v1/backup", "1111 3+ 33 33", "/api/v1/backup", "", 200},
	{"PUT", "/api/v1/backup", "1111 3+ 33 33", "/api/v1/backup", "no backup", 422},
	{"GET", "/metrics", "1111 ++ ++ ++", "/metrics", "", 200},
	{"GET", "/health", "++++ ++ ++ ++", "/health", "", 200},
	{"GET", "/health/ready", "++++ ++ ++ ++", "/health/ready", "", 200},
	{"GET", "/openapi.json", "++++ ++ ++ ++", "/openapi.json", "", 200},
	{"GET", "/swagger", "++++ ++ ++ ++", "/swagger", "", 200},
	{"GET", "/swagger/{file}", "++++ ++ ++ ++", "/swagger/page.js", "", 200},
	{"DELETE", "/api/v1/config/{ns}/{key...}", "1111 3+ 33 +3", "/api/v1/config/NS/db/WHO", "", 204},
	{"DELETE", "/api/v1/namespaces/{ns}", "1111 3+ 33 +3", "/api/v1/namespaces/NS-WHO", "", 204},
}

// limited are the namespaces of the limited keys.
var limited = []string{"roles", "roles-*"}

// TestMatrix walks every route with every caller, on a follower and on the leader. A route that
// is not in the matrix fails it, so nobody adds one without saying here who may use it.
func TestMatrix(t *testing.T) {
	var said, are []string
	for _, m := range matrix {
		said = append(said, m.method+" "+m.pattern)
	}
	for _, rt := range (&server{}).routes() {
		are = append(are, rt.method+" "+rt.pattern)
		if strings.Contains(rt.pattern, "{ns}") != (rt.scope == oneNamespace) {
			t.Errorf("%s %s has scope %d", rt.method, rt.pattern, rt.scope)
		}
	}
	slices.Sort(said)
	slices.Sort(are)
	if d := cmp.Diff(said, are); d != "" {
		t.Fatalf("routes (-matrix +program):\n%s", d)
	}

	c := startCluster(t, 3, calm,
		addKey(limitedReaderKey, "Limited reader", "reader", "Namespaces", limited),
		addKey(limitedAdminKey, "Limited admin", "admin", "Namespaces", limited),
		addKey(expiredKey, "Expired", "admin", "NotAfter", time.Now().Add(-time.Second).Format(time.RFC3339)),
		addKey(revokedKey, "Revoked", "admin"))
	leader, follower := c.leader(), c.followers()[0]
	for _, path := range []string{"config/others", "config/others-admin"} {
		if a := leader.write(t, "PATCH", "/api/v1/"+path, `{"k":"v"}`); a.status != http.StatusOK {
			t.Fatalf("PATCH %s: %v", path, a)
		}
	}
	for _, n := range c.nodes {
		if a, err := do("GET", n.url+"/api/v1/namespaces", revokedKey, ""); err != nil || a.status != http.StatusOK {
			t.Fatalf("before it is revoked, a key is answered %v, %v on %s", a, err, n.id)
		}
	}
	c.configure(dropKey("Revoked"))
	for _, n := range c.nodes {
		n.reload()
	}

	var rev uint64 // of the last write, which the follower's reads wait for
	for _, m := range matrix {
		writes := m.method != "GET"
		until(t, 15*time.Second, func() error {
			if _, st, err := follower.status(); err != nil || st.Revision < rev {
				return fmt.Errorf("%s is at revision %d, not yet at %d (%v)", follower.id, st.Revision, rev, err)
			}
			return nil
		})
		cells := strings.ReplaceAll(m.cells, " ", "")
		if len(cells) != len(callers) {
			t.Fatalf("%s %s has %d cells for %d callers", m.method, m.pattern, len(cells), len(callers))
		}
		for _, n := range []*node{follower, leader} { // a follower's refusals leave the leader something to do
			for i, who := range callers {
				want := m.status
				switch {
				case cells[i] == '1':
					want = http.StatusUnauthorized
				case cells[i] == '3':
					want = http.StatusForbidden
				case writes && n == follower:
					want = http.StatusTemporaryRedirect
				}
				methods := []string{m.method}
				if m.method == "GET" {
					methods = append(methods, "HEAD")
				}
				name := strings.ReplaceAll(who.name, " ", "-")
				target := strings.NewReplacer("NS", who.ns, "WHO", name).Replace(m.target)
				for _, method := range methods {
					a, err := do(method, n.url+target, who.key, m.body)
					if err != nil {
						t.Fatal(err)
					}
					if a.status != want {
						t.Errorf("%s %s on %s by %s: %v, want %d", method, target, n.id, who.name, a, want)
					}
					if to := a.header.Get("Location"); want == http.StatusTemporaryRedirect && to != leader.url+target {
						t.Errorf("%s %s on %s by %s: redirected to %s", method, target, n.id, who.name, to)
					}
					if (a.header.Get("WWW-Authenticate") != "") != (want == http.StatusUnauthorized) {
						t.Errorf("%s %s on %s by %s: %d with WWW-Authenticate %q", method, target, n.id, who.name, a.status, a.header.Get("WWW-Authenticate"))
					}
				}
				if strings.Contains(m.target, "NS") && strings.ContainsRune("13", rune(cells[i])) {
					missing := map[string]string{"roles": "roles-none", "others": "none"}[who.ns]
					there := strings.NewReplacer("NS", who.ns, "WHO", "admin").Replace(m.target)
					sameRefusal(t, n, m.method, there, strings.NewReplacer("NS", missing, "WHO", "none").Replace(m.target), who.key, m.body)
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

// TestSecretsStayOut sends keys and values in every place where they might be taken for something to
// report, through restarts, the loss of a majority and everything that a debugging log says, and looks
// for them in answers, logs, the list of processes, and for files that others can read.
func TestSecretsStayOut(t *testing.T) {
	t.Parallel()
	const value = "s3cr3t-value-of-a-key"
	secrets := []string{adminKey, readerKey, value, clusterSecret}
	c := newCluster(t, 3)
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
		for _, rr := range matrix {
			for _, key := range []string{"", wrongKey} {
				a, err := do(rr.method, n.url+strings.NewReplacer("NS", "secrets", "WHO", "k").Replace(rr.target), key, rr.body)
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
	a := newAuth(keys, nil)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		for _, v := range []any{a, *a, a.keys, a.keys[1].caller} {
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
		who, err := a.identify(&http.Request{Header: maps.Clone(tt.header)}, &route{role: tt.need}, "")
		kind := error(nil)
		if err != nil {
			kind = problemOf(err).kind
		}
		if kind != tt.err || tt.err == nil && who.principal != tt.who {
			t.Errorf("%v for role %d: %q, %v; want %q, %v", tt.header, tt.need, who.principal, err, tt.who, tt.err)
		}
	}
}

// TestNamespacesOfKey: a key covers the names that it lists and those that begin as it says.
func TestNamespacesOfKey(t *testing.T) {
	t.Parallel()
	for _, m := range []struct {
		namespaces []string
		yes, no    string
	}{
		{nil, "a prod Z.9", ""},
		{[]string{"prod"}, "prod", "prod2 pro Prod prod-eu xprod"},
		{[]string{"team-*"}, "team- team-a team-a.b", "team Team-a ateam-a"},
		{[]string{"prod", "team-*"}, "prod team-x", "product team"},
		{[]string{"*"}, "a prod", ""},
		{[]string{}, "", "a prod"}, // no file can say so
	} {
		k := caller{namespaces: m.namespaces}
		for want, names := range map[bool]string{true: m.yes, false: m.no} {
			for _, ns := range strings.Fields(names) {
				if k.covers(ns) != want {
					t.Errorf("%q covers %s: %t", m.namespaces, ns, !want)
				}
			}
		}
	}
}

// TestMistakenKeys: what is no key, no digest, no namespace and no time is a mistake that names the
// member; a key and its digest are one key.
func TestMistakenKeys(t *testing.T) {
	t.Parallel()
	digest := fmt.Sprintf("%x", sha256.Sum256([]byte("cm_test_mistaken")))
	for _, m := range []struct{ members, want string }{
		{`"Key": "cm_test_mistaken"`, ""},
		{`"Key": "sha256:` + digest + `"`, ""},
		{`"Key": "sha256:` + strings.ToUpper(digest) + `"`, ""},
		{`"Key": "k", "Namespaces": ["a", "A.b_c-d", "team-*", "*"], "NotAfter": "2027-01-31T12:00:00.5+02:00"`, ""},
		{`"Key": "sha256:` + digest[1:] + `"`, "Auth.ApiKeys[1].Key: "},
		{`"Key": "sha256:` + digest + `00"`, "Auth.ApiKeys[1].Key: "},
		{`"Key": "sha256:"`, "Auth.ApiKeys[1].Key: "},
		{`"Key": "sha256:` + fmt.Sprintf("%x", sha256.Sum256(nil)) + `"`, "Auth.ApiKeys[1].Key: sha256: is followed by the digest of nothing"},
		{`"Key": "SHA256:cm_test"`, "Auth.ApiKeys[1].Key: "},
		{`"Key": "sha256: ` + digest + `"`, "Auth.ApiKeys[1].Key: "},
		{`"Key": "sha256:` + strings.Repeat("g", 64) + `"`, "Auth.ApiKeys[1].Key: "},
		{`"Key": "` + adminKey + `"`, "Auth.ApiKeys[1].Key: the same"},
		{`"Key": "sha256:` + fmt.Sprintf("%X", sha256.Sum256([]byte(adminKey))) + `"`, "Auth.ApiKeys[1].Key: the same"},
		{`"Key": "k", "Namespaces": []`, "Auth.ApiKeys[1].Namespaces: empty"},
		{`"Key": "k", "Namespaces": null`, "Auth.ApiKeys[1].Namespaces: null"},
		{`"Key": "k", "Namespaces": "prod"`, "Auth.ApiKeys[1].Namespaces: wrong kind"},
		{`"Key": "k", "Namespaces": [null]`, "Auth.ApiKeys[1].Namespaces[0]: null"},
		{`"Key": "k", "Namespaces": ["a", ""]`, "Auth.ApiKeys[1].Namespaces[1]: "},
		{`"Key": "k", "Namespaces": ["a", "b*c"]`, "Auth.ApiKeys[1].Namespaces[1]: "},
		{`"Key": "k", "Namespaces": ["*a"]`, "Auth.ApiKeys[1].Namespaces[0]: "},
		{`"Key": "k", "Namespaces": ["a**"]`, "Auth.ApiKeys[1].Namespaces[0]: "},
		{`"Key": "k", "Namespaces": ["-*"]`, "Auth.ApiKeys[1].Namespaces[0]: "},
		{`"Key": "k", "Namespaces": ["a/b"]`, "Auth.ApiKeys[1].Namespaces[0]: "},
		{`"Key": "k", "Namespaces": ["a b"]`, "Auth.ApiKeys[1].Namespaces[0]: "},
		{`"Key": "k", "Namespaces": ["` + strings.Repeat("a", 129) + `"]`, "Auth.ApiKeys[1].Namespaces[0]: "},
		{`"Key": "k", "NotAfter": ""`, "Auth.ApiKeys[1].NotAfter: "},
		{`"Key": "k", "NotAfter": null`, "Auth.ApiKeys[1].NotAfter: null"},
		{`"Key": "k", "NotAfter": "2027-01-31"`, "Auth.ApiKeys[1].NotAfter: "},
		{`"Key": "k", "NotAfter": "2027-01-31T12:00:00"`, "Auth.ApiKeys[1].NotAfter: "},
		{`"Key": "k", "NotAfter": 1800000000`, "Auth.ApiKeys[1].NotAfter: wrong kind"},
	} {
		path := filepath.Join(t.TempDir(), "confman.json")
		text := fmt.Sprintf(`{"Cluster": {"NodeId": "a", "Nodes": [{"Id": "a", "Address": "127.0.0.1", "ApiPort": 1, "RaftPort": 2}]},
			"Auth": {"ApiKeys": [{"Key": "%s", "Name": "a", "Role": "admin"}, {%s, "Name": "b", "Role": "reader"}]}}`, adminKey, m.members)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := loadConfig(path, "")
		switch {
		case m.want == "" && err != nil:
			t.Errorf("%s: %v", m.members, err)
		case m.want != "" && (err == nil || !errors.Is(err, errUsage) || !strings.Contains(err.Error(), m.want)):
			t.Errorf("%s: %v, want a mistake in %s", m.members, err, m.want)
		case err != nil && (strings.Contains(err.Error(), adminKey) || strings.Contains(err.Error(), digest[8:])):
			t.Errorf("%s: the error shows a key: %v", m.members, err)
		}
	}
}

// TestLimitedKeys: a key that is limited to some namespaces sees no trace of others: not in the list
// of namespaces, page by page, and not by how a request is refused. Its digest lets nobody in.
func TestLimitedKeys(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, addKey(limitedReaderKey, "Limited reader", "reader", "Namespaces", []string{"mine-*", "zz", "never"}))
	n := c.nodes[0]
	for _, ns := range strings.Fields("a mine mine- mine-2 mine-3 mine-31 mine.x mines minf z z9 zz zzz") {
		n.put(t, ns, "k", "v")
	}
	get := func(path string, headers ...string) *answer {
		t.Helper()
		a, err := do("GET", n.url+path, limitedReaderKey, "", headers...)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	want := []string{"mine-", "mine-2", "mine-3", "mine-31", "zz"}
	for _, size := range []int{1, 2, 3, 5, 1000} {
		for _, prefix := range []string{"", "mine-", "m", "z"} {
			var mine, got []string
			for _, ns := range want {
				if strings.HasPrefix(ns, prefix) {
					mine = append(mine, ns)
				}
			}
			path, pages := fmt.Sprintf("/api/v1/namespaces?limit=%d&prefix=%s", size, prefix), 0
			for cursor := ""; ; pages++ {
				var page struct {
					Items      []struct{ Path string }
					Pagination struct {
						HasMore    bool
						NextCursor *string
					}
				}
				a := get(path + cursor)
				if err := json.Unmarshal(a.body, &page); err != nil || a.status != http.StatusOK {
					t.Fatalf("GET %s: %v", path+cursor, a)
				}
				for _, it := range page.Items {
					got = append(got, it.Path)
				}
				if page.Pagination.NextCursor == nil {
					break
				}
				if len(page.Items) != size || len(got) == len(mine) {
					t.Errorf("GET %s has %d items and says that there are more", path+cursor, len(page.Items))
				}
				at, err := base64.RawURLEncoding.DecodeString(*page.Pagination.NextCursor)
				if err != nil || !slices.Contains(want, string(at[1:])) {
					t.Errorf("GET %s: the cursor is %q (%v)", path+cursor, at, err)
				}
				cursor = "&cursor=" + *page.Pagination.NextCursor
			}
			if d := cmp.Diff(mine, got); d != "" {
				t.Errorf("namespaces with limit %d and prefix %q (-want +got):\n%s", size, prefix, d)
			}
		}
	}
	// Nothing is looked at before the namespace is, whatever else is wrong or held.
	var first map[string]any
	for _, path := range []string{"config/%s", "config/%s/k", "config/%s/k?wait=1m", "config/%s/k?bogus", "config/%s/k?version=x", "namespaces/%s", "namespaces/%s/keys?cursor=x", "audit/%s", "audit/%s?since=999"} {
		for _, headers := range [][]string{nil, {"Accept", "text/event-stream"}, {"If-None-Match", `"1"`}, {"If-None-Match", "1"}, {"Confman-Min-Revision", "999999"}} {
			for _, ns := range []string{"a", "mine", "none"} {
				at := "/api/v1/" + fmt.Sprintf(path, ns)
				doc := problemDoc(t, "GET", n.url+at, limitedReaderKey, "", headers...)
				delete(doc, "instance")
				if first == nil {
					first = doc
				}
				if d := cmp.Diff(first, doc); d != "" || doc["type"] != "https://confman/errors/forbidden" {
					t.Errorf("GET %s with %q, want a 403 like all (-first +this one):\n%s", at, headers, d)
				}
				if a := get(at, headers...); a.header.Get("ETag") != "" {
					t.Errorf("GET %s with %q has the ETag %s", at, headers, a.header.Get("ETag"))
				}
			}
		}
	}
	if a := get("/api/v1/config/never"); a.status != http.StatusNotFound {
		t.Errorf("a namespace of its own that is not there: %v", a)
	}
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(readerKey)))
	c.configure(dropKey("Service"), addKey(digest, "Service", "reader"))
	n.reload()
	for key, want := range map[string]int{readerKey: http.StatusOK, digest: http.StatusUnauthorized, digest[7:]: http.StatusUnauthorized} {
		if a, err := do("GET", n.url+"/api/v1/namespaces", key, ""); err != nil || a.status != want {
			t.Errorf("with %s, of which the file has the digest: %v, %v, want %d", key, a, err, want)
		}
	}
}

// TestKeyInPath: a key that was pasted into a path is in no line of the log.
func TestKeyInPath(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	const k = "cm_Q54XYVcdf-3I6H3GrMODtIsWFDRBchuVYGQFzt35HNI"
	for _, p := range []string{"/" + k, "/api/v1/" + k, "/api/v1/config/_" + k, "/api/v1/config/app/" + k + "//" + k, "/api/v1/config/app/" + k + "%0A", "/api/v1/config/app/x%2F" + k + "%2F.."} {
		if a, err := do("GET", n.url+p, adminKey, ""); err != nil || a.status/100 != 4 {
			t.Errorf("%s: %v, %v", p, a, err)
		}
	}
	if strings.Contains(n.logged(), k) {
		t.Error("the log holds it")
	}
}
