package main

// The shell blocks of README.md are run, in order, and what they print is what stands below them.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A block is a fenced one of the manual.
type block struct {
	chapter string
	line    int    // of its fence
	lang    string // behind the fence
	text    string // its lines, each ended
	shown   string // of shell, the block without a language that follows: what it prints
}

// first is the block's first line, by which tests name it.
func (b *block) first() string { return strings.TrimSpace(strings.SplitN(b.text, "\n", 2)[0]) }

// blocks returns the manual's fenced blocks in order, without those that are the output of one.
func blocks(t *testing.T) (all []*block) {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var in *block
	chapter, number := "", 0
	for line := range strings.Lines(string(text)) {
		number++
		fence, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case in == nil && isFence:
			in = &block{chapter: chapter, line: number, lang: fence}
		case isFence:
			var last *block
			if len(all) > 0 {
				last = all[len(all)-1]
			}
			if in.lang != "" {
				all = append(all, in)
			} else if last == nil || last.lang != "sh" || last.chapter != chapter || last.shown != "" {
				t.Errorf("README.md:%d: a block without a language is the output of the shell block before it, and there is none", in.line)
			} else {
				last.shown = in.text
			}
			in = nil
		case in != nil:
			in.text += line
		case strings.HasPrefix(line, "## "):
			chapter = strings.TrimSpace(line[3:])
		}
	}
	return all
}

// A session is a shell that runs blocks of the manual, one after the other.
type session struct {
	chapters []string          // whole, but for blocks that another session runs apart
	apart    map[string]string // blocks of any chapter, by their first line, and what is run before, unseen
	prelude  string
	leaders  int // how often some node comes to lead
}

var sessions = map[string]session{
	"TestManualCommands": {
		chapters: []string{"SYNOPSIS", "DESCRIPTION", "QUICK START", "API", "CONFIGURATION", "SECURITY", "OPERATION", "DIAGNOSTICS", "FILES", "LIMITS"},
		// A pause of the manual is for its reader. Behind each block the nodes come to the same revision: a
		// plain read of a follower may be some milliseconds behind the block before it.
		prelude: `sleep() { case $1 in 0.*) command sleep $1 ;; *) command sleep 1 ;; esac; }
between() { until [ $(curl -s -m 1 http://127.0.0.1:50{10,20,30}/health/ready | grep -o '"revision":[0-9]*' | sort -u | wc -l) -le 1 ]; do command sleep 0.05; done; }
`,
		leaders: 4,
	},
	"TestManualDrills": {chapters: []string{"FIRE DRILLS"}, prelude: "between() { :; }\n"},
	// The three machines are one, which has all addresses. Its system directories are copies or empty, and
	// enough of systemd is played to run the unit as its user: enable starts it on each machine, and what
	// else is said to systemctl is said on the first.
	"TestManualDeployment": {
		apart: map[string]string{
			"useradd --system --no-create-home --shell /usr/sbin/nologin confman":                                                            "",
			"systemctl daemon-reload && systemctl enable --now confman":                                                                      "",
			"curl -sf --retry 20 --retry-delay 1 --retry-all-errors http://10.0.1.10:5000/health/ready":                                      "",
			"runuser -u confman -- confman -check -config /etc/confman/confman.json -node node1 -data /var/lib/confman | grep -v '^program'": "",
			"cd /etc/confman": "",
			"curl -sf --retry 20 --retry-delay 1 --retry-all-errors --cacert /etc/confman/api.crt https://10.0.1.10:5000/health/ready": `
sed -i 's|^{|&"Tls": {"Cert": "/etc/confman/api.crt", "Key": "/etc/confman/api.key"},|' /etc/confman/confman.json
for n in node1 node2 node3; do end $n; machine $n; done
`,
			"runuser -u confman -- confman -config /etc/confman/confman.json -node node1 -data /var/lib/confman -restore confman.backup": `
cd /var/lib/confman
K='X-API-Key: confman_demo_admin' A='-sf --cacert /etc/confman/api.crt -L --retry 20 --retry-delay 1 --retry-all-errors' U=https://10.0.1.10:5000/api/v1
for i in a b c; do curl $A -o /dev/null -X PUT -H "$K" -d '{"value":"v"}' $U/config/billing/$i; done
curl $A -o confman.backup -H "$K" -H 'Confman-Min-Revision: 3' $U/backup && chown confman confman.backup
for n in node1 node2 node3; do end $n; rm -r $n; done
`,
			"systemctl restart confman":         "",
			"systemctl reload confman; sleep 1": "",
		},
		prelude: `between() { :; }
cp -a /etc etc; mount --bind etc /etc; mkdir -p /etc/confman /etc/systemd/system; cp deploy/confman.service /etc/systemd/system
mkdir bin; chmod 0755 bin; ln confman bin/confman; mount --bind bin /usr/local/bin; mount -t tmpfs none /var/lib; mount -t tmpfs none /var/log
for a in 10 11 12; do ip addr add 10.0.1.$a/32 dev lo; done
sed -e '/node1/s/127.0.0.1/10.0.1.10/; /node2/s/127.0.0.1/10.0.1.11/; /node3/s/127.0.0.1/10.0.1.12/; s/50[123]0/5000/; s/50[123]1/5001/' \
	-e 's|"Cluster": {|&"Secret": "'$(confman -keygen secret)'",|' testdata/cluster.json >/etc/confman/confman.json
unit() { sed -n "s/^$1=//p" /etc/systemd/system/confman.service; }
machine() {
	local command=$(unit ExecStart)
	install -d -m $(unit StateDirectoryMode) -o $(unit User) -g $(unit User) /var/lib/$(unit StateDirectory)
	setpriv --reuid $(unit User) --regid $(unit User) --init-groups env $(unit Environment) ${command//%l/$1} >/dev/null 2>>/tmp/$1.log &
}
end() { pkill -f -- "-node $1"; while pgrep -f -- "-node $1" >/dev/null; do command sleep 0.1; done; }
systemctl() {
	case $1 in
	enable) machine node1; machine node2; machine node3 ;;
	reload) pkill -HUP -f -- "-node node1" ;;
	restart) end node1; machine node1 ;;
	start) machine node1 ;;
	esac
}
journalctl() { cat /tmp/node1.log; }
`,
	},
}

// of returns the blocks of the manual that a session runs.
func (s session) of(all []*block) (run []*block) {
	apart := map[string]bool{}
	for _, s := range sessions {
		for first := range s.apart {
			apart[first] = true
		}
	}
	for _, b := range all {
		_, here := s.apart[b.first()]
		if b.lang == "sh" && notRun[b.first()] == "" && (here || slices.Contains(s.chapters, b.chapter) && !apart[b.first()]) {
			run = append(run, b)
		}
	}
	return run
}

// instead is what is run in the place of a block, by its first line.
var instead = map[string]string{
	// It does not end, and the tests run already.
	"go run .": `: >/tmp/alone; ./confman >/tmp/alone 2>/tmp/alone.log &
until [ "$(wc -l </tmp/alone)" = 4 ]; do command sleep 0.05; done; cat /tmp/alone
`,
}

// notRun are the blocks that no session runs, by their first line, and why.
var notRun = map[string]string{
	"docker compose -f deploy/compose.yaml up -d --build": "needs docker",
	"defaults": "a file, not commands",
}

// TestManualBlocks: every block of the manual is run by a session, or notRun says why not, and what instead
// and notRun name is there.
func TestManualBlocks(t *testing.T) {
	t.Parallel()
	all := blocks(t)
	if len(all) == 0 {
		t.Fatal("README.md has no blocks")
	}
	seen, run := map[string]bool{}, map[*block]bool{}
	for _, s := range sessions {
		for _, b := range s.of(all) {
			run[b] = true
		}
	}
	for _, b := range all {
		seen[b.first()] = true
		if !run[b] && notRun[b.first()] == "" {
			t.Errorf("README.md:%d: no session runs this block of the chapter %s, and notRun does not say why", b.line, b.chapter)
		}
	}
	for _, s := range sessions {
		for first := range s.apart {
			if !seen[first] {
				t.Errorf("README.md has no block that begins with %q any more", first)
			}
		}
	}
	for first := range instead {
		if !seen[first] {
			t.Errorf("README.md has no block that begins with %q any more", first)
		}
	}
	for first := range notRun {
		if !seen[first] {
			t.Errorf("README.md has no block that begins with %q any more", first)
		}
	}
}

// TestManualCommands runs the manual's commands but for the fire drills as they stand there, on the ports
// that they name, in namespaces of its own, and compares what they print with what the manual shows.
// With -update it writes what they print into the manual instead, of one run.
func TestManualCommands(t *testing.T) {
	t.Parallel()
	runSession(t)
}

// TestManualDrills runs the fire drills likewise.
func TestManualDrills(t *testing.T) {
	long(t)
	t.Parallel()
	runSession(t)
}

// TestManualDeployment runs what is to be done on machines of their own.
func TestManualDeployment(t *testing.T) {
	long(t)
	needs(t, "useradd", "setpriv", "runuser", "openssl", "mount", "install")
	if os.Getuid() != 0 {
		t.Skip("needs root, for a user and directories of the system")
	}
	t.Parallel()
	runSession(t)
}

// runSession runs the session of the test's name. Where it prints something else than the manual shows, and
// a leader has been replaced that should not be, as on a machine that is busy, it is run again.
func runSession(t *testing.T) {
	needs(t, "bash", "curl", "pkill", "unshare", "ip", "tac", "sha256sum", "python3")
	own := []string{"-n", "-p", "-f", "--kill-child", "--mount-proc"}
	if os.Getuid() != 0 {
		own = append(own, "-r")
	}
	if out, err := exec.Command("unshare", append(own, "ip", "link", "set", "lo", "up")...).CombinedOutput(); err != nil {
		t.Skipf("no namespaces of its own: %v: %s", err, out)
	}
	s := sessions[t.Name()]
	for round := 1; ; round++ {
		complaints, leaders := s.run(t, own)
		if len(complaints) > 0 && leaders > s.leaders && round < 3 && s.leaders > 0 {
			t.Logf("round %d: a leader was replaced, %d came to lead; again", round, leaders)
			continue
		}
		for _, c := range complaints {
			t.Error(c)
		}
		return
	}
}

// run runs the session once. It returns where it prints something else than the manual shows, and how often
// a node came to lead.
func (s session) run(t *testing.T, own []string) (complaints []string, leaders int) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err == nil {
		// The program is this binary, see TestMain. It has the name that the manual's pkill looks for.
		if at := filepath.Join(dir, "confman"); os.Link(exe, at) != nil {
			var b []byte
			if b, err = os.ReadFile(exe); err == nil {
				err = os.WriteFile(at, b, 0o700)
			}
		}
	}
	if err := errors.Join(err, os.CopyFS(filepath.Join(dir, "testdata"), os.DirFS("testdata")),
		os.CopyFS(filepath.Join(dir, "deploy"), os.DirFS("deploy")), os.Mkdir(filepath.Join(dir, "tmp"), 0o700)); err != nil {
		t.Fatal(err)
	}
	all := blocks(t)
	var script strings.Builder
	script.WriteString("cd " + dir + "\nip link set lo up\ngo() { :; }\n" + strings.ReplaceAll(s.prelude, "/tmp/", dir+"/tmp/"))
	run := s.of(all)
	for _, b := range run {
		text := b.text
		if other := instead[b.first()]; other != "" {
			text = other
		}
		text = s.apart[b.first()] + text
		script.WriteString(strings.ReplaceAll(text, "/tmp/", dir+"/tmp/") + "printf '\\036\\n'; between\n")
	}
	writeFile(t, filepath.Join(dir, ".curlrc"), []byte("no-progress-meter\n")) // as on a terminal
	// A file: what stands in the arguments of the shell, pkill -f would find there.
	writeFile(t, filepath.Join(dir, "tmp", "session"), []byte(script.String()))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", append(own, "bash", "tmp/session")...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CONFMAN_NODE="+manualNode, "GORACE=halt_on_error=1", "PATH="+dir+":"+os.Getenv("PATH"), "CURL_HOME="+dir)
	cmd.WaitDelay = 5 * time.Second
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		complaints = append(complaints, fmt.Sprintf("%v\n%s", err, errs.Bytes()))
	}
	for line := range strings.Lines(errs.String()) {
		if !jobEnded.MatchString(line) {
			complaints = append(complaints, "on standard error: "+line)
		}
	}
	logs, err := filepath.Glob(filepath.Join(dir, "tmp", "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range logs {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		leaders += strings.Count(string(text), "msg=leading ")
		if bytes.Contains(text, []byte("panic:")) {
			complaints = append(complaints, name+": "+string(text))
		}
	}
	got := strings.Split(strings.NewReplacer(dir+"/tmp/", "/tmp/", "\r\n", "\n").Replace(string(out)), "\x1e\n")
	shown, printed := newMask(), newMask()
	var wantListening, gotListening []string
	text := ""
	if *update {
		text = manual(t)
	}
	for i, b := range run {
		if i >= len(got)-1 {
			complaints = append(complaints, fmt.Sprintf("README.md:%d and what follows was not run", b.line))
			break
		}
		want, listening := shown.hide(b.shown)
		wantListening = append(wantListening, listening...)
		is, listening := printed.hide(got[i])
		gotListening = append(gotListening, listening...)
		if *update {
			if b.shown == "" && is != "" {
				t.Fatalf("README.md:%d has no place for what it prints: add an empty block below it", b.line)
			}
			if b.shown != "" {
				before, after, _ := strings.Cut(text, "```sh\n"+b.text)
				text = before + "```sh\n" + b.text + strings.Replace(after, "\n```\n"+b.shown+"```\n",
					"\n```\n"+only(b.shown, true)+only(got[i], false)+"```\n", 1)
			}
			continue
		}
		if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(is, "\n")); diff != "" {
			complaints = append(complaints, fmt.Sprintf("README.md:%d prints\n%s\nthe manual shows\n%s\n(-manual +printed, masked):\n%s", b.line, got[i], b.shown, diff))
		}
	}
	if *update {
		if err := os.WriteFile("README.md", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(wantListening, gotListening); diff != "" {
		complaints = append(complaints, fmt.Sprintf("nodes that listen (-manual +printed):\n%s", diff))
	}
	return complaints, leaders
}

// only returns those lines of an output by which nodes say that they listen, or the others.
func only(text string, listening bool) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "listening ") == listening {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// jobEnded is what bash says of a job that was killed.
var jobEnded = regexp.MustCompile(`^tmp/session: line \d+: +\d+ (Killed|Terminated)`)

// A mask hides what differs from one run to the next. What is drawn anew in each run becomes a number, by
// the order in which it first comes, so that what is the same in two places of the manual is in the run, too.
type mask map[string]string

func newMask() mask {
	none := strings.Repeat("0", 64) // before the first event; no other run has another
	return mask{none: none, none[:8]: none[:8]}
}

var (
	// Drawn anew: hashes and digests, times, correlation ids, keys.
	drawn = regexp.MustCompile(`\b[0-9a-f]{64}\b|\bhash [0-9a-f]{8}\b|\d{4}-\d\d-\d\dT[0-9:.]+Z|\b[A-Z2-7]{26}\b|\bcm_[A-Za-z0-9_-]{43}`)
	// Different from run to run: the time and a time's length in an answer's head, ages, terms, process
	// numbers, free space, how long something took, what the program was built from, who leads, and how far
	// a node was when the leader heard of it last.
	differing = regexp.MustCompile(`Date: .*|Content-Length: \d+|Confman-Staleness-Ms: \d+|"stalenessMs":-?\d+|"lastContactMs":-?\d+|"diskFreeBytes":\d+|"version":"[^"]*"|"term":\d+|process \d+|took=[0-9a-zµ.]+|confman (?:v\d\S+|devel)|` +
		`"role":"\w+"|"voter":true,"revision":\d+,"hash":"\w+"|"leader":"[^"]*"|"leaderId":"[^"]*"|\bsize=\d+`)
	whoLeads = regexp.MustCompile(`(node)[123]( is ready, )(?:leader|follower)`)
	whoSays  = regexp.MustCompile(`\bnode=node[123]\b`)
	address  = regexp.MustCompile(`(127\.0\.0\.1:50)[123]([01])`)
)

// hide masks a block's output. The lines by which nodes of the background say that they listen come when
// they come, and are returned apart.
func (m mask) hide(text string) (masked string, listening []string) {
	text = differing.ReplaceAllString(text, "~")
	text = drawn.ReplaceAllStringFunc(text, func(s string) string {
		if m[s] == "" {
			m[s] = fmt.Sprintf("<%d>", len(m))
		}
		return m[s]
	})
	text = whoSays.ReplaceAllString(whoLeads.ReplaceAllString(text, "$1$2"), "node=")
	for line := range strings.Lines(only(text, true)) {
		listening = append(listening, address.ReplaceAllString(line, "$1~$2"))
	}
	return only(text, false), listening
}
