package main

// README.md is the manual, and these tests keep it true: what the program has is in the
// manual, and what the manual has is in the program.

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// chapter returns the part of README.md under a heading of the second level.
func chapter(t *testing.T, title string) string {
	t.Helper()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut("\n"+string(b), "\n## "+title+"\n")
	if !ok {
		t.Fatalf("README.md has no chapter %s", title)
	}
	text, _, _ := strings.Cut(after, "\n## ")
	return text
}

// rows returns the cells of the table rows in text whose first cell matches.
func rows(text, first string) (found [][]string) {
	want := regexp.MustCompile("^(?:" + first + ")$")
	for line := range strings.Lines(text) {
		line, ok := strings.CutPrefix(strings.TrimSpace(line), "|")
		if !ok {
			continue
		}
		cells := strings.Split(strings.TrimSuffix(strings.ReplaceAll(line, `\|`, "\x00"), "|"), "|")
		for i, c := range cells {
			cells[i] = strings.ReplaceAll(strings.TrimSpace(c), "\x00", "|")
		}
		if want.MatchString(cells[0]) {
			found = append(found, cells)
		}
	}
	return found
}

// TestManualRoutes: every route is a heading of the manual's chapter API and the reverse,
// and its section names every query parameter that it takes.
func TestManualRoutes(t *testing.T) {
	t.Parallel()
	text := chapter(t, "API")
	sections := map[string]string{}
	headings := regexp.MustCompile(`(?m)^### ([A-Z]+ /\S*)$`).FindAllStringSubmatchIndex(text, -1)
	for i, at := range headings {
		end := len(text)
		if i+1 < len(headings) {
			end = headings[i+1][0]
		}
		sections[text[at[2]:at[3]]] = text[at[1]:end]
	}
	for _, rt := range (&server{}).routes() {
		name := rt.method + " " + strings.Replace(rt.pattern, "{key...}", "{key}", 1)
		section, ok := sections[name]
		if !ok {
			t.Errorf("the chapter API has no heading ### %s", name)
			continue
		}
		delete(sections, name)
		for _, p := range strings.Fields(rt.params) {
			if strings.Contains(reads, p) {
				continue // described once, for all reads
			}
			if !strings.Contains(section, "`"+p+"`") && !strings.Contains(section, "`?"+p) {
				t.Errorf("%s: its section does not name the parameter %s", name, p)
			}
		}
		for need, word := range map[role]string{public: "Who: anyone.", reader: "Who: readers and admins.", admin: "Who: admins."} {
			if strings.Contains(section, word) != (need == rt.role) {
				t.Errorf("%s: its section says %q: %t", name, word, need != rt.role)
			}
		}
		for of, word := range map[scope]string{wholeStore: "Not for limited keys.", ownNamespaces: "A limited key sees its own."} {
			if strings.Contains(section, word) != (of == rt.scope) {
				t.Errorf("%s: its section says %q: %t", name, word, of != rt.scope)
			}
		}
	}
	for name := range sections {
		t.Errorf("the program has no route %s", name)
	}
	for _, p := range strings.Fields(reads) {
		if !strings.Contains(text, "`?"+p+"`") {
			t.Errorf("the chapter API does not name ?%s, which every read takes", p)
		}
	}
}

// TestManualFlags: every flag is in the manual with its default and the reverse.
func TestManualFlags(t *testing.T) {
	t.Parallel()
	_, _, help := runNode(t, t.TempDir(), "-help")
	want := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^  -(\w+).*\n(.*)$`).FindAllStringSubmatch(help, -1) {
		want[m[1]] = "none"
		if d := regexp.MustCompile(`\(default "?([^")]*)"?\)$`).FindStringSubmatch(m[2]); d != nil {
			want[m[1]] = d[1]
		}
	}
	if len(want) == 0 {
		t.Fatalf("-help lists no flags: %s", help)
	}
	got := map[string]string{}
	for _, r := range rows(chapter(t, "SYNOPSIS"), "`-.*") {
		got[strings.Fields(strings.Trim(r[0], "`-"))[0]] = strings.Trim(r[1], "`")
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("flags and defaults (-program +manual):\n%s", diff)
	}
}

// TestManualProblems: every kind of problem is in the manual's table of errors with
// status and outcome and the reverse. A kind is found where the program's text makes one.
func TestManualProblems(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if id, ok := lit.Type.(*ast.Ident); !ok || id.Name != "kind" {
				return true
			}
			members := map[string]string{"outcome": "not-applied"}
			for _, e := range lit.Elts {
				kv := e.(*ast.KeyValueExpr)
				v := kv.Value.(*ast.BasicLit).Value
				if s, err := strconv.Unquote(v); err == nil {
					v = s
				}
				members[kv.Key.(*ast.Ident).Name] = v
			}
			if members["status"] == "499" {
				return true // for the log: the client is gone and reads nothing
			}
			if want[members["slug"]] != "" {
				t.Errorf("two kinds are called %s", members["slug"])
			}
			want[members["slug"]] = members["status"] + " " + members["outcome"]
			return true
		})
	}
	got := map[string]string{}
	for _, r := range rows(chapter(t, "API"), `\d{3}`) {
		slug, outcome := strings.Trim(r[1], "`"), strings.Trim(r[2], "`")
		if outcome == "-" && strings.HasSuffix(want[slug], " not-applied") {
			outcome = "not-applied" // a kind that only reads meet
		}
		got[slug] = r[0] + " " + outcome
		if len(r) < 4 || r[3] == "" {
			t.Errorf("%s: the table does not say what to do", slug)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kinds of problems (-program +manual):\n%s", diff)
	}
}

// TestManualConfiguration: every member of the configuration file is in the manual with
// its default and the reverse.
func TestManualConfiguration(t *testing.T) {
	t.Parallel()
	want := map[string]string{}
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				if f := v.Type().Field(i); f.IsExported() {
					walk(strings.TrimPrefix(path+"."+f.Name, "."), v.Field(i))
				}
			}
		case reflect.Slice:
			want[path] = ""
			if elem := v.Type().Elem(); elem.Kind() == reflect.Struct {
				walk(path+"[]", reflect.Zero(elem))
			}
		default:
			want[path] = ""
			if !v.IsZero() || v.Kind() == reflect.Bool {
				want[path] = fmt.Sprint(v)
			}
		}
	}
	walk("", reflect.ValueOf(*defaults()))
	var names []string
	for _, r := range rows(chapter(t, "CONFIGURATION"), "`[A-Z].*`") {
		name := strings.Trim(r[0], "`")
		names = append(names, name)
		d, ok := want[name]
		switch {
		case !ok:
			t.Errorf("the program has no member %s", name)
		case d != "" && strings.Trim(r[1], "`") != d:
			t.Errorf("%s: the default is %s, the manual says %s", name, d, r[1])
		case len(r) < 3 || r[1] == "" || r[2] == "":
			t.Errorf("%s: a cell is empty", name)
		}
	}
	for name := range want {
		if !slices.Contains(names, name) {
			t.Errorf("the chapter CONFIGURATION has no row for %s", name)
		}
	}
}

// needs skips a test that runs the manual's commands where one of them is not installed.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: %v", p, err)
		}
	}
}

// excerpt returns what stands in the manual from one text to the next other, without them.
func excerpt(t *testing.T, from, to string) string {
	t.Helper()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), from)
	text, _, ok2 := strings.Cut(rest, to)
	if !ok || !ok2 {
		t.Fatalf("README.md has nothing between %q and %q", from, to)
	}
	return text
}

// TestManualFollow runs the manual's shell loop, kills it and the leader, and expects every event of
// the namespace, in order; one again at most for each time that it was killed.
func TestManualFollow(t *testing.T) {
	needs(t, "sh", "curl", "cat", "mv", "sleep")
	t.Parallel()
	const kills, changes = 6, 60
	c := startCluster(t, 3)
	c.nodes[0].put(t, "news", "k", "first")
	loop := "follow() {" + excerpt(t, "\nfollow() {", "\n}\n") + "\n}\nfollow news\n"
	const ports = "5010 5020 5030"
	if !strings.Contains(loop, ports) {
		t.Fatalf("the loop does not name the ports %s:\n%s", ports, loop)
	}
	var own []string
	for _, n := range c.nodes {
		own = append(own, n.api[strings.LastIndex(n.api, ":")+1:])
	}
	loop = strings.Replace(loop, ports, strings.Join(own, " "), 1)
	dir := t.TempDir()
	printed := filepath.Join(dir, "printed")
	var follower *exec.Cmd
	start := func() {
		t.Helper()
		out, err := os.OpenFile(printed, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		follower = exec.Command("sh", "-c", loop)
		follower.Dir, follower.Stdout, follower.Stderr = dir, out, io.Discard
		follower.Env = append(os.Environ(), "READER=X-API-Key: "+readerKey)
		follower.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err := follower.Start(); err != nil {
			t.Fatal(err)
		}
	}
	kill := func() {
		syscall.Kill(-follower.Process.Pid, syscall.SIGKILL)
		follower.Wait()
	}
	events := func() (ids []string) {
		b, err := os.ReadFile(printed)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var e eventDoc
			if err := json.Unmarshal([]byte(line), &e); err != nil || !strings.HasSuffix(line, "\n") {
				continue // it was killed in the middle of a line, or is still writing
			}
			ids = append(ids, e.ID)
		}
		return ids
	}
	start()
	defer func() { kill() }()
	for round := range kills {
		seen := len(events())
		for i := range changes {
			c.nodes[i%3].put(t, "news", "k", fmt.Sprint(round, i))
		}
		until(t, limit(20*time.Second), func() error {
			if got := len(events()); got <= seen {
				return fmt.Errorf("round %d: it has printed %d events still", round, got)
			}
			return nil
		})
		if round == kills/2 {
			old := c.leader()
			old.kill()
			c.leader()
			old.start()
			c.ready()
		} else {
			kill()
			start()
		}
	}
	var want []string
	for _, e := range c.leader().trail(t, "news") {
		want = append(want, e.ID)
	}
	until(t, limit(30*time.Second), func() error {
		if got := events(); !slices.Contains(got, want[len(want)-1]) {
			return fmt.Errorf("%d events are printed, of %d", len(got), len(want))
		}
		return nil
	})
	got := events()
	missing, twice, wrongOrder := countIDs(want, got)
	t.Logf("%d events, %d printed twice", len(want), twice)
	if missing > 0 || twice > kills || wrongOrder > 0 {
		t.Errorf("%d missing, %d twice in %d kills, %d out of order", missing, twice, kills, wrongOrder)
	}
}

// TestManualVerify runs the manual's program that computes a trail's hashes anew.
func TestManualVerify(t *testing.T) {
	needs(t, "python3")
	t.Parallel()
	c := startCluster(t, 1, func(doc map[string]any) { doc["Audit"] = map[string]any{"KeepEvents": 10} })
	n := c.nodes[0]
	for _, v := range []string{"plain", "\x01 \x7f \u2028 \\ \" ü 😀 </b>", "\t\n\r\b\f"} {
		n.put(t, "app", "k/ü", v)
	}
	n.delete(t, "app", "k/ü")
	n.write(t, "PUT", "/api/v1/namespaces/app", `{"description":"d"}`)
	program := excerpt(t, "cat >/tmp/verify.py <<'END'\n", "\nEND\n")
	run := func(events int) {
		t.Helper()
		_, st, err := n.status()
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("python3", "-c", program, n.url+"/api/v1", adminKey).CombinedOutput()
		if want := fmt.Sprintf("%d events, revision %d hash %s\n", events, st.Revision, st.Hash); err != nil || string(out) != want {
			t.Errorf("%q, %v, want %q", out, err, want)
		}
	}
	run(5)
	// And that of a trail that was trimmed.
	body := `{"k0":0`
	for k := range 600 {
		body += fmt.Sprintf(`,"k%d":%d`, k+1, k)
	}
	n.write(t, "PATCH", "/api/v1/config/app", body+"}")
	for v := range 10 {
		n.put(t, "app", "k", fmt.Sprint(v))
	}
	until(t, limit(10*time.Second), func() error {
		if trail := n.trail(t, ""); trail[len(trail)-1].Action != "audit.trim" {
			return fmt.Errorf("of %d events the newest is %s", len(trail), trail[len(trail)-1].raw)
		}
		return nil
	})
	run(11)
}

// TestManualDigest: the manual's command makes of a key the digest that a node takes for it.
func TestManualDigest(t *testing.T) {
	needs(t, "sh", "sha256sum", "cut")
	t.Parallel()
	sh := exec.Command("sh", "-c", excerpt(t, "stays the same key:\n\n```sh\n", "```\n"))
	sh.Env = append(os.Environ(), "KEY="+adminKey)
	out, err := sh.Output()
	if err != nil {
		t.Fatal(err)
	}
	clear, _ := apiKey{Key: adminKey}.digest()
	digest, err := apiKey{Key: strings.TrimSuffix(string(out), "\n")}.digest()
	if err != nil || digest != clear {
		t.Errorf("it prints %q (%v), not the digest %x", out, err, clear)
	}
}

// sources returns the text of the package's Go files, the program's or the tests'.
func sources(t *testing.T, tests bool) string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") != tests {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	return all.String()
}

// found returns what the first group of an expression matches in text, each once.
func found(text, expr string) (all []string) {
	for _, m := range regexp.MustCompile(expr).FindAllStringSubmatch(text, -1) {
		all = append(all, m[1])
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// manual returns README.md.
func manual(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestManualLogLines: what the manual quotes of the log and of the last line of a node that fails is in the
// source, of raft and of net/http where it is theirs; and each warning of the program is in the manual, for
// errors are there as a whole.
func TestManualLogLines(t *testing.T) {
	needs(t, "go")
	t.Parallel()
	dirs, err := exec.Command("go", "list", "-f", "{{.Dir}}", "github.com/hashicorp/raft", "net/http").Output()
	if err != nil {
		t.Fatal(err)
	}
	own := sources(t, false)
	theirs := map[string]string{"raft: ": "", "http: ": ""}
	for _, dir := range strings.Fields(string(dirs)) {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		of := "http: "
		if strings.Contains(dir, "raft") {
			of = "raft: "
		}
		for _, name := range files {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			theirs[of] += string(b)
		}
	}
	quotes := slices.Concat(found(manual(t), `msg="([^"\n]*)"`), found(chapter(t, "DIAGNOSTICS"), "`confman: ([^`]*)`"))
	if len(quotes) < 20 {
		t.Fatalf("the manual quotes %q only", quotes)
	}
	for _, quote := range quotes {
		in := own
		for prefix, text := range theirs {
			if rest, ok := strings.CutPrefix(quote, prefix); ok {
				quote, in = rest, text
			}
		}
		for part := range strings.SplitSeq(quote, "...") {
			if part = strings.TrimSuffix(strings.Trim(part, " ;"), "[^"); !strings.Contains(in, part) {
				t.Errorf("the manual quotes %q, and no source has %q", quote, part)
			}
		}
	}
	text := manual(t)
	for _, warning := range found(own, `\.Warn\("([^"]*)"`) {
		// The manual may leave the end out.
		said := slices.ContainsFunc(found(text, `msg="([^"\n]*)"`), func(quote string) bool {
			head, _, _ := strings.Cut(quote, "...")
			return strings.HasPrefix(warning, strings.TrimSpace(head))
		})
		if !said {
			t.Errorf("the manual does not say what the warning %q means", warning)
		}
	}
}

// TestManualExits: the exit statuses of the program are those of the manual's table.
func TestManualExits(t *testing.T) {
	t.Parallel()
	want := append([]string{"0"}, found(sources(t, false), `os\.Exit\((\w+)\)`)...)
	var got []string
	for _, r := range rows(chapter(t, "DIAGNOSTICS"), `\d+`) {
		got = append(got, r[0])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("exit statuses (-program +manual):\n%s", diff)
	}
}

// TestManualEnvironment: the variables that program and tests read are in the manual, and the reverse.
func TestManualEnvironment(t *testing.T) {
	t.Parallel()
	const variable = `Getenv\("(CONFMAN_[A-Z]+)"\)`
	want := append(found(sources(t, false), variable), found(sources(t, true), variable)...)
	want = slices.DeleteFunc(want, func(name string) bool { return name == "CONFMAN_NODE" }) // the tests' own
	slices.Sort(want)
	if diff := cmp.Diff(slices.Compact(want), found(manual(t), `(CONFMAN_[A-Z]+)`)); diff != "" {
		t.Errorf("variables (-source +manual):\n%s", diff)
	}
}

// TestManualActions: the actions of events are those that the manual lists.
func TestManualActions(t *testing.T) {
	t.Parallel()
	const action = `((?:config|namespace|store|audit|node|leader)\.[a-z]+(?:\.[a-z]+)*)`
	want := found(sources(t, false), `"`+action+`"`)
	_, list, ok := strings.Cut(chapter(t, "API"), "\n`id` is `<revision>-<index within it>`. `action` is ")
	list, _, ok2 := strings.Cut(list, "\n`actor` is")
	if !ok || !ok2 {
		t.Fatal("the section Audit events does not list the actions")
	}
	if diff := cmp.Diff(want, found(list, "`"+action+"`")); diff != "" {
		t.Errorf("actions (-program +manual):\n%s", diff)
	}
}

// TestManualHeaders: the headers of the program's own are in the manual, but for those between nodes, and
// the reverse.
func TestManualHeaders(t *testing.T) {
	t.Parallel()
	const header = `(Confman-[A-Za-z-]+)`
	want := slices.DeleteFunc(found(sources(t, false), `"`+header+`"`), func(name string) bool {
		return slices.Contains([]string{"Confman-Deadline", "Confman-Forwarded", "Confman-Source"}, name)
	})
	if diff := cmp.Diff(want, found(chapter(t, "API"), header)); diff != "" {
		t.Errorf("headers (-program +manual):\n%s", diff)
	}
}

// TestManualTesting: what the chapter TESTING names is there: every fuzz test, and what -run selects.
func TestManualTesting(t *testing.T) {
	t.Parallel()
	text, tests := chapter(t, "TESTING"), sources(t, true)
	if diff := cmp.Diff(found(tests, `\nfunc (Fuzz\w+)`), found(text, `\b(Fuzz\w+)`)); diff != "" {
		t.Errorf("fuzz tests (-source +manual):\n%s", diff)
	}
	for _, name := range found(text, "-run (\\w+)[` ]") {
		if !regexp.MustCompile(`\nfunc Test\w*` + name).MatchString(tests) {
			t.Errorf("no test is called %s", name)
		}
	}
	for _, file := range found(manual(t), "`(testdata/[^` ]*|\\.ci/[^` ]*|deploy/[^` ]*)`") {
		if _, err := os.Stat(file); err != nil {
			t.Errorf("the manual names a file: %v", err)
		}
	}
}
