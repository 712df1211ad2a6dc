package main

// What deploy/ holds is run by other programs. These tests read it as they do, as far as that goes
// without them; with CONFMAN_LONG=1 those that are installed read it themselves.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// readYAML reads a file of deploy/ into v, which has every member that the file may have.
func readYAML(t *testing.T, name string, v any) {
	t.Helper()
	f, err := os.Open(filepath.Join("deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dec := yaml.NewDecoder(f)
	dec.KnownFields(true)
	if err := dec.Decode(v); err != nil {
		t.Fatalf("deploy/%s: %v", name, err)
	}
}

// An alert is a rule of deploy/alerts.yml.
type alert struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

// alerts reads deploy/alerts.yml.
func alerts(t *testing.T) (all []alert) {
	t.Helper()
	var file struct {
		Groups []struct {
			Name  string
			Rules []alert
		}
	}
	readYAML(t, "alerts.yml", &file)
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// A panel is one of deploy/dashboard.json.
type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Datasource               struct{ Type, UID string }
	FieldConfig              struct {
		Defaults struct{ Unit string }
	}
	Targets []struct {
		RefID, Expr, LegendFormat string
		Datasource                struct{ Type, UID string }
	}
}

// A dashboard is deploy/dashboard.json, as far as it is looked at.
type dashboard struct {
	UID, Title    string
	SchemaVersion int
	Templating    struct {
		List []struct{ Name, Type string }
	}
	Panels []panel
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile("deploy/dashboard.json")
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil {
		t.Fatalf("deploy/dashboard.json: %v", err)
	}
	return d
}

// expressions are all that deploy/ asks Prometheus for, by where they stand.
func expressions(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, a := range alerts(t) {
		all["alerts.yml, "+a.Alert] = a.Expr
	}
	for _, p := range readDashboard(t).Panels {
		for _, target := range p.Targets {
			all["dashboard.json, "+p.Title+", "+target.RefID] = target.Expr
		}
	}
	if len(all) < 40 {
		t.Fatalf("deploy/ has %d expressions", len(all))
	}
	return all
}

// TestDeployNamed: the manual names each file of deploy/, and no other.
func TestDeployNamed(t *testing.T) {
	t.Parallel()
	var there []string
	err := filepath.WalkDir("deploy", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			there = append(there, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	said := regexp.MustCompile(`\bdeploy/[\w.-]*\w`).FindAllString(chapter(t, "DEPLOYMENT"), -1)
	for _, path := range there {
		if !slices.Contains(said, path) {
			t.Errorf("the chapter DEPLOYMENT does not name %s", path)
		}
	}
	for _, path := range said {
		if !slices.Contains(there, path) {
			t.Errorf("the chapter DEPLOYMENT names %s, which is not there", path)
		}
	}
}

// TestDeployAlerts: each alert is one that somebody can act on, and the manual's table has a metric
// worth an alert for each metric that one asks for.
func TestDeployAlerts(t *testing.T) {
	t.Parallel()
	all := alerts(t)
	names, asked := map[string]bool{}, map[string]bool{}
	for _, a := range all {
		if !regexp.MustCompile(`^Confman[A-Z][A-Za-z]+$`).MatchString(a.Alert) || names[a.Alert] {
			t.Errorf("an alert is called %q, or two are", a.Alert)
		}
		names[a.Alert] = true
		if a.Expr == "" || a.Annotations["summary"] == "" || a.Annotations["description"] == "" || len(a.Annotations) != 2 {
			t.Errorf("%s: expr, summary and description are %q, %q", a.Alert, a.Expr, a.Annotations)
		}
		if s := a.Labels["severity"]; s != "critical" && s != "warning" {
			t.Errorf("%s: severity is %q", a.Alert, s)
		}
		if _, err := time.ParseDuration(a.For); a.For != "" && err != nil {
			t.Errorf("%s: for: %v", a.Alert, err)
		}
		for _, name := range metricNames(a.Expr) {
			asked[strings.TrimSuffix(name, "_bucket")] = true
		}
	}
	for _, r := range rows(chapter(t, "DIAGNOSTICS"), "`confman_.*`") {
		if name := strings.Trim(r[0], "`"); len(r) == 4 && r[3] != "" && !asked[name] && name != "confman_connections" {
			t.Errorf("the manual says when %s is worth an alert, and deploy/alerts.yml has none", name)
		}
	}
}

// TestDeployDashboard: panels stand side by side and below each other, each with a query by the
// variables of the dashboard.
func TestDeployDashboard(t *testing.T) {
	t.Parallel()
	d := readDashboard(t)
	if d.UID == "" || d.Title == "" || d.SchemaVersion < 30 {
		t.Errorf("uid %q, title %q, schema version %d", d.UID, d.Title, d.SchemaVersion)
	}
	var vars []string
	for _, v := range d.Templating.List {
		vars = append(vars, v.Name+" "+v.Type)
	}
	if want := []string{"datasource datasource", "job query"}; !slices.Equal(vars, want) {
		t.Errorf("variables are %q, want %q", vars, want)
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if p.ID == 0 || ids[p.ID] || p.Title == "" {
			t.Errorf("panel %q has id %d, or another one has", p.Title, p.ID)
		}
		ids[p.ID] = true
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("panel %q stands at %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("panels %q and %q stand on each other", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 || p.Datasource.UID != "${datasource}" {
			t.Errorf("panel %q: %+v", p.Title, p)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if refs[target.RefID] || target.LegendFormat == "" || target.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q: %+v", p.Title, target)
			}
			refs[target.RefID] = true
			for _, name := range metricNames(target.Expr) {
				if n := strings.Count(target.Expr, name+"{"); n != strings.Count(target.Expr, name) || !strings.Contains(target.Expr, name+`{job="$job"`) {
					t.Errorf("panel %q shows %s of all clusters: %s", p.Title, name, target.Expr)
				}
			}
		}
	}
}

// TestDeployPrometheus: Prometheus is told of the nodes of deploy/compose.yaml, with a key from a file.
func TestDeployPrometheus(t *testing.T) {
	t.Parallel()
	var file struct {
		Global struct {
			ScrapeInterval     string `yaml:"scrape_interval"`
			EvaluationInterval string `yaml:"evaluation_interval"`
		}
		RuleFiles     []string `yaml:"rule_files"`
		ScrapeConfigs []struct {
			JobName       string `yaml:"job_name"`
			Authorization struct {
				CredentialsFile string `yaml:"credentials_file"`
			}
			StaticConfigs []struct{ Targets []string } `yaml:"static_configs"`
		} `yaml:"scrape_configs"`
	}
	readYAML(t, "prometheus.yml", &file)
	for _, name := range file.RuleFiles {
		if _, err := os.Stat(filepath.Join("deploy", name)); err != nil {
			t.Error(err)
		}
	}
	if len(file.RuleFiles) != 1 || len(file.ScrapeConfigs) != 1 || file.ScrapeConfigs[0].JobName != "confman" {
		t.Fatalf("%+v", file)
	}
	s := file.ScrapeConfigs[0]
	if s.Authorization.CredentialsFile != "confman.key" || len(s.StaticConfigs) != 1 {
		t.Errorf("%+v", s)
	}
	var nodes []string
	for _, m := range deployedConfig(t).Cluster.Nodes {
		nodes = append(nodes, hostPort(m.Address, m.ApiPort))
	}
	if !slices.Equal(s.StaticConfigs[0].Targets, nodes) {
		t.Errorf("it asks %q, the nodes are at %q", s.StaticConfigs[0].Targets, nodes)
	}
}

// deployedConfig is deploy/cluster.json as a node reads it.
func deployedConfig(t *testing.T) *config {
	t.Helper()
	cfg, err := configure([]string{"-config", "deploy/cluster.json", "-node", "node1"})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestDeployCompose: the file has the nodes of deploy/cluster.json, each with a directory and a port of
// its own, and gives the program what deploy/Dockerfile expects.
func TestDeployCompose(t *testing.T) {
	t.Parallel()
	type build struct{ Context, Dockerfile string }
	type service struct {
		Image           string
		Build           build
		Restart         string
		StopGracePeriod string   `yaml:"stop_grace_period"`
		ReadOnly        bool     `yaml:"read_only"`
		CapDrop         []string `yaml:"cap_drop"`
		SecurityOpt     []string `yaml:"security_opt"`
		Ulimits         map[string]int
		Command         []string
		Ports, Volumes  []string
	}
	var file struct {
		Name     string
		Node     service `yaml:"x-node"`
		Services map[string]service
		Volumes  map[string]any
	}
	readYAML(t, "compose.yaml", &file)
	docker := dockerfile(t)
	cfg := deployedConfig(t)
	ports := map[string]bool{}
	for _, m := range cfg.Cluster.Nodes {
		s, ok := file.Services[m.Id]
		if !ok || m.Address != m.Id {
			t.Errorf("there is no service for node %s at %s", m.Id, m.Address)
		}
		if _, ok := file.Volumes[m.Id]; !ok {
			t.Errorf("there is no volume %s", m.Id)
		}
		if !slices.Equal(s.Command, []string{"-node", m.Id}) || !slices.Equal(s.Volumes, []string{"./cluster.json:/etc/confman/confman.json:ro", m.Id + ":/data"}) {
			t.Errorf("%s: command %q, volumes %q", m.Id, s.Command, s.Volumes)
		}
		if len(s.Ports) != 1 || ports[s.Ports[0]] || !strings.HasSuffix(s.Ports[0], fmt.Sprintf(":%d", m.ApiPort)) || !strings.HasPrefix(s.Ports[0], "127.0.0.1:") {
			t.Errorf("%s: ports %q", m.Id, s.Ports)
		}
		ports[s.Ports[0]] = true
		if grace, err := time.ParseDuration(s.StopGracePeriod); err != nil || grace < cfg.requestTimeout()+10*time.Second {
			t.Errorf("%s: stop_grace_period %s", m.Id, s.StopGracePeriod)
		}
		if s.Build.Dockerfile != "deploy/Dockerfile" || filepath.Join("deploy", s.Build.Context, s.Build.Dockerfile) != "deploy/Dockerfile" || s.Restart != "unless-stopped" {
			t.Errorf("%s: %+v", m.Id, s)
		}
		if need := cfg.Limits.MaxConnections + ownFiles; s.Ulimits["nofile"] < need {
			t.Errorf("%s: %d open files, it needs %d", m.Id, s.Ulimits["nofile"], need)
		}
	}
	if len(file.Services) != len(cfg.Cluster.Nodes) || len(file.Volumes) != len(cfg.Cluster.Nodes) {
		t.Errorf("%d services, %d volumes", len(file.Services), len(file.Volumes))
	}
	if !slices.Contains(docker["VOLUME"], "/data") {
		t.Errorf("the image has the volumes %q", docker["VOLUME"])
	}
}

// dockerfile reads deploy/Dockerfile: the instructions of its last stage, and as BUILD the commands
// that are run before.
func dockerfile(t *testing.T) map[string][]string {
	t.Helper()
	b, err := os.ReadFile("deploy/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]string{}
	var stages []string
	for i, line := range strings.Split(string(b), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, rest, ok := strings.Cut(line, " ")
		known := []string{"FROM", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT"}
		if !ok || !slices.Contains(known, name) || len(stages) == 0 && name != "FROM" {
			t.Errorf("deploy/Dockerfile:%d: %s", i+1, line)
		}
		switch {
		case name == "FROM":
			stages = append(stages, rest)
			builds := append(found["BUILD"], found["RUN"]...)
			found = map[string][]string{"BUILD": builds}
		case name == "COPY" && strings.Contains(rest, "--from=") && !strings.Contains(strings.Join(stages, "\n"), " AS "+regexp.MustCompile(`--from=(\w+)`).FindStringSubmatch(rest)[1]):
			t.Errorf("deploy/Dockerfile:%d: there is no such stage: %s", i+1, line)
		}
		found[name] = append(found[name], rest)
	}
	if len(stages) != 2 || found["FROM"][0] != "scratch" {
		t.Errorf("deploy/Dockerfile has the stages %q", stages)
	}
	return found
}

// TestDeployDockerfile: what the image is made of is built as the manual says, by the Go that go.mod asks
// for, and starts with arguments that the program takes, as another user than root.
func TestDeployDockerfile(t *testing.T) {
	t.Parallel()
	d := dockerfile(t)
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("deploy/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(mod)
	if !strings.Contains(string(b), "FROM golang:"+string(version[1])+" AS build\n") {
		t.Errorf("go.mod asks for Go %s", version[1])
	}
	const build = "CGO_ENABLED=0 go build -trimpath"
	if !strings.Contains(strings.Join(d["BUILD"], "\n"), build+" -o /out/confman .") || !strings.Contains(chapter(t, "DEPLOYMENT"), "`"+build+"`") {
		t.Errorf("the image is built by %q, the manual says otherwise", d["BUILD"])
	}
	var entry []string
	if err := json.Unmarshal([]byte(strings.Join(d["ENTRYPOINT"], "")), &entry); err != nil || len(entry) < 1 {
		t.Fatalf("ENTRYPOINT %q: %v", d["ENTRYPOINT"], err)
	}
	if !slices.Contains(d["COPY"], "--from=build /out/confman "+entry[0]) {
		t.Errorf("%s is not in the image: %q", entry[0], d["COPY"])
	}
	args := append(entry[1:], "-node", "node1")
	at := slices.Index(args, "-config")
	if at < 0 || args[at+1] != "/etc/confman/confman.json" {
		t.Fatalf("it is started with %q", args)
	}
	args[at+1] = "deploy/cluster.json"
	cfg, err := configure(args)
	if err != nil || cfg.Storage.DataPath != "/data" {
		t.Errorf("it is started with %q: %v", args, err)
	}
	if len(d["USER"]) != 1 || !regexp.MustCompile(`^[1-9]\d*:[1-9]\d*$`).MatchString(d["USER"][0]) || !slices.Contains(d["COPY"], "--from=build --chown="+d["USER"][0]+" /out/data /data") {
		t.Errorf("it runs as %q", d["USER"])
	}
}

// TestDeployUnit: systemd takes the unit, and it starts the program with arguments that it takes.
func TestDeployUnit(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("deploy/confman.service")
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			said[name] = value
		}
	}
	for name, want := range map[string]string{
		"User": "confman", "StateDirectory": "confman", "ExecReload": "/bin/kill -HUP $MAINPID", "Restart": "always",
		"RestartPreventExitStatus": "2", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "WantedBy": "multi-user.target",
	} {
		if said[name] != want {
			t.Errorf("%s=%s, want %s", name, said[name], want)
		}
	}
	program, rest, _ := strings.Cut(said["ExecStart"], " ")
	args := strings.Fields(strings.Replace(rest, "%l", "node1", 1))
	at := slices.Index(args, "-config")
	if program != "/usr/local/bin/confman" || at < 0 || args[at+1] != "/etc/confman/confman.json" {
		t.Fatalf("ExecStart=%s", said["ExecStart"])
	}
	args[at+1] = "deploy/cluster.json"
	if cfg, err := configure(args); err != nil || cfg.Storage.DataPath != "/var/lib/"+said["StateDirectory"] {
		t.Errorf("ExecStart=%s: %v", said["ExecStart"], err)
	}

	needs(t, "systemd-analyze")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// It wants a program that is there, and a user.
	text := strings.NewReplacer("ExecStart="+program, "ExecStart="+exe, "User=confman", "User=root").Replace(string(b))
	path := filepath.Join(t.TempDir(), "confman.service")
	verify := func(text string) string {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path).CombinedOutput()
		if err != nil {
			return fmt.Sprintf("%v: %s", err, out)
		}
		return string(out)
	}
	if out := verify(text); strings.Contains(out, "confman") || strings.Contains(out, "exit status") {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	if out := verify(strings.Replace(text, "ProtectSystem=strict", "ProtectSystem=strickt", 1)); !strings.Contains(out, "strickt") {
		t.Errorf("systemd-analyze verify passes a mistake over: %s", out)
	}
}

// TestPrometheus has a real Prometheus, with the files of deploy/, scrape a cluster under load for a
// minute. Its promtool finds nothing to mend, all rules evaluate, every query of the dashboard has
// data, no alert fires, and one would when a node is gone.
func TestPrometheus(t *testing.T) {
	long(t)
	needs(t, "prometheus", "promtool")
	t.Parallel()
	c := startCluster(t, 3, calm, with("Cluster", "Forward", true))

	over := make(chan struct{})
	var load sync.WaitGroup
	t.Cleanup(func() { load.Wait() })
	end := sync.OnceFunc(func() { close(over) })
	t.Cleanup(end)
	value := strings.Repeat("v", 8<<10) // so much that snapshots are due
	for i, n := range c.nodes {
		load.Go(func() {
			pace := time.NewTicker(20 * time.Millisecond)
			defer pace.Stop()
			for k := 0; ; k++ {
				select {
				case <-over:
					return
				case <-pace.C:
				}
				at := n.url + keyPath("load", fmt.Sprint(i, "-", k%100))
				do("PUT", at, adminKey, fmt.Sprintf(`{"value":"%s%d"}`, value, k)) // a node may be gone
				do("GET", at, readerKey, "")
				do("GET", n.url+"/api/v1/config/load?limit=3", readerKey, "")
				if k%50 == 0 {
					do("GET", at, wrongKey, "")
					do("GET", at+"?wait=10ms", readerKey, "", "If-None-Match", `"1"`)
					do("GET", n.url+"/nowhere", readerKey, "")
				}
			}
		})
	}

	dir := t.TempDir()
	b, err := os.ReadFile("deploy/prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, n := range c.nodes {
		targets = append(targets, fmt.Sprintf("%q", n.api))
	}
	// More often than one would, for there is a minute.
	text := strings.NewReplacer(`"node1:5000", "node2:5000", "node3:5000"`, strings.Join(targets, ", "), "15s", "2s").Replace(string(b))
	rules, err := os.ReadFile("deploy/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"prometheus.yml": text, "alerts.yml": string(rules), "confman.key": readerKey + "\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	promtool := func(in string, args ...string) {
		t.Helper()
		cmd := exec.Command("promtool", args...)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(in)
		if out, err := cmd.CombinedOutput(); err != nil || in != "" && len(out) > 0 {
			t.Errorf("promtool %s: %v\n%s", args, err, out)
		}
	}
	promtool("", "check", "config", "prometheus.yml")
	promtool("", "check", "rules", "alerts.yml")

	at := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	prometheus := exec.Command("prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address="+at)
	prometheus.Dir = dir
	prometheus.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	prometheus.Stdout, prometheus.Stderr = &said, &said
	if err := prometheus.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		prometheus.Process.Kill()
		prometheus.Wait()
		if t.Failed() {
			t.Logf("prometheus: %s", said.Bytes())
		}
	})
	ask := func(path string, query url.Values, data any) error {
		resp, err := client.Get("http://" + at + "/api/v1/" + path + "?" + query.Encode()) // not do: it is no node
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		doc := struct {
			Status, Error string
			Data          any
		}{Data: data}
		if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil || doc.Status != "success" {
			return fmt.Errorf("%s %q: %s %s (%v)", path, query, resp.Status, doc.Error, err)
		}
		return nil
	}
	began := time.Now()
	var state struct {
		ActiveTargets []struct{ Health, LastError string }
	}
	until(t, 30*time.Second, func() error {
		if err := ask("targets", nil, &state); err != nil {
			return err
		}
		for _, target := range state.ActiveTargets {
			if target.Health != "up" {
				return fmt.Errorf("%+v", state)
			}
		}
		if len(state.ActiveTargets) != len(c.nodes) {
			return fmt.Errorf("%+v", state)
		}
		return nil
	})
	time.Sleep(time.Minute) // the time is what this is about

	type result struct {
		Result []struct {
			Metric map[string]string
			Values [][2]any
		}
	}
	expand := strings.NewReplacer("$job", "confman", "$__rate_interval", "20s")
	queries := 0
	for _, p := range readDashboard(t).Panels {
		for _, target := range p.Targets {
			queries++
			var r result
			err := ask("query_range", url.Values{"query": {expand.Replace(target.Expr)}, "step": {"5"},
				"start": {fmt.Sprint(began.Unix())}, "end": {fmt.Sprint(time.Now().Unix())}}, &r)
			points := 0
			for _, series := range r.Result {
				for _, v := range series.Values {
					if v[1] != "NaN" {
						points++
					}
				}
			}
			if err != nil || points == 0 {
				t.Errorf("panel %q, %s: %d series, %d points, %v", p.Title, target.Expr, len(r.Result), points, err)
			}
		}
	}
	var groups struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, State string }
		}
	}
	if err := ask("rules", nil, &groups); err != nil {
		t.Fatal(err)
	}
	evaluated := 0
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			if evaluated++; r.Health != "ok" || r.State == "firing" {
				t.Errorf("%+v", r)
			}
		}
	}
	if want := len(alerts(t)); evaluated != want {
		t.Errorf("%d of %d alerts were evaluated", evaluated, want)
	}
	t.Logf("%d queries, %d alerts", queries, evaluated)
	for _, n := range c.nodes {
		a := n.ask(t, "GET", "/metrics", "")
		promtool(string(a.body), "check", "metrics")
		t.Logf("%s: %d bytes of metrics", n.id, len(a.body))
	}

	c.followers()[0].kill()
	until(t, 15*time.Second, func() error {
		if err := ask("rules", nil, &groups); err != nil {
			return err
		}
		for _, g := range groups.Groups {
			for _, r := range g.Rules {
				if r.Name == "ConfmanNodeDown" && r.State != "inactive" {
					return nil
				}
			}
		}
		return errors.New("ConfmanNodeDown does not notice that a node is gone")
	})
	end()
	load.Wait()
}
