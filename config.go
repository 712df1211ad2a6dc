package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// A config is the configuration file. Times are milliseconds. Member names are matched
// without regard to case.
type config struct {
	Cluster struct {
		NodeId string // which of Nodes this is; -node overrides it
		Nodes  []nodeConfig
		Listen string // host to listen on; empty: the node's own Address
		// LowerElectionTimeout is how long a follower waits for its leader before it stands
		// for election; raft draws from it to twice that.
		LowerElectionTimeout int
		UpperElectionTimeout int // if given, twice the lower
		RequestTimeout       int // how long a write may take
		MaxStaleness         int // how far behind a plain read may be
		Forward              bool
		// Secret is what the nodes prove to each other that they have, see secret.go. Of Secrets,
		// which stands in its place while it is changed, the first is shown and all are accepted.
		Secret  *string
		Secrets []string
	}
	Storage struct {
		DataPath string
		// MinFreeMiB is what must stay free on the disk: below it, and on the leader below twice
		// the state file, nothing but deletes is taken.
		MinFreeMiB int
	}
	Auth struct {
		ApiKeys []apiKey
	}
	Audit struct {
		// What is older than KeepDays, or not among the newest KeepEvents events, is trimmed from the
		// trail; 0 is no limit. Of no effect but on the leader.
		KeepDays, KeepEvents int
	}
	Tls struct {
		Cert, Key string // files of the API's certificate chain and key, PEM; both empty: plain text
	}
	Limits struct {
		MaxValueBytes         int
		MaxBodyBytes          int
		MaxHeaderBytes        int
		MaxConnections        int // of clients
		MaxStreams            int // streams and waits
		MaxStreamsPerKey      int
		AuthFailuresPerMinute int // of one address
	}
	// TrustedProxies are the addresses and networks whose X-Forwarded-For is believed.
	TrustedProxies []string

	args    []string       // of the program
	file    string         // empty without one
	format  string         // of the log: text or json
	keyIn   string         // the made key's file; empty with a configuration file
	join    bool           // this node is new in a cluster that is there
	restore string         // the backup to make the data directory of; empty: be a node
	keygen  string         // what to print and be done, key or secret; empty: be a node
	secrets []secret       // the cluster's, decoded by check
	checks  bool           // say what a start would do and be done
	version bool           // print which program this is and be done
	proxies []netip.Prefix // TrustedProxies
}

type nodeConfig struct {
	Id       string
	Address  string
	ApiPort  int
	RaftPort int
}

// self is the node that this process is.
func (c *config) self() nodeConfig {
	for _, n := range c.Cluster.Nodes {
		if n.Id == c.Cluster.NodeId {
			return n
		}
	}
	return nodeConfig{}
}

// requestTimeout is how long a request may take.
func (c *config) requestTimeout() time.Duration {
	return time.Duration(c.Cluster.RequestTimeout) * time.Millisecond
}

// hostPort joins the two; an IPv6 address gets its brackets.
func hostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// logger writes to standard error. CONFMAN_DEBUG lets the lines below Info through.
func (c *config) logger() *slog.Logger {
	opts := &slog.HandlerOptions{}
	if os.Getenv("CONFMAN_DEBUG") != "" {
		opts.Level = slog.LevelDebug
	}
	var h slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if c.format == "json" {
		h = slog.NewJSONHandler(os.Stderr, opts)
	}
	return slog.New(h).With("node", c.Cluster.NodeId)
}

// errUsage is in every error that is a mistake in the arguments or in the configuration
// file: exit status 2.
var errUsage = errors.New("usage")

// A mistake is an error of that kind.
type mistake string

func (m mistake) Error() string   { return string(m) }
func (m mistake) Is(e error) bool { return e == errUsage }

func mistaken(format string, args ...any) error { return mistake(fmt.Sprintf(format, args...)) }

// configure reads the arguments and the file that they name.
func configure(args []string) (*config, error) {
	flags := flag.NewFlagSet("confman", flag.ContinueOnError)
	file := flags.String("config", "", "configuration `file`; without it, a single node on 127.0.0.1")
	id := flags.String("node", "", "`id` of this node, one of Cluster.Nodes")
	data := flags.String("data", "", "`directory` of all data, in place of Storage.DataPath")
	format := flags.String("log", "text", "`format` of the log on standard error: text or json")
	join := flags.Bool("join", false, "with an empty directory, begin no cluster but wait to be added to the one of Cluster.Nodes")
	restore := flags.String("restore", "", "make the data directory of a new cluster's first node from a backup, a `file`, and end")
	generate := flags.Bool("keygen", false, "print a new API key and its line for the file and end; with the word secret, a new secret")
	checks := flags.Bool("check", false, "say what a start would do, do none of it and end")
	which := flags.Bool("version", false, "print which program this is and end")
	var said bytes.Buffer // its words go out as one line, like every mistake
	flags.SetOutput(&said)
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		os.Stderr.Write(said.Bytes())
		return nil, err
	} else if err != nil {
		return nil, mistaken("%v; -help lists the flags", err)
	}
	if *generate {
		what := cmp.Or(flags.Arg(0), "key")
		switch {
		case flags.NFlag() > 1:
			return nil, mistaken("-keygen goes with no other flag")
		case flags.NArg() > 1 || what != "key" && what != "secret":
			return nil, mistaken("-keygen %s: prints a key or a secret", strings.Join(flags.Args(), " "))
		}
		return &config{keygen: what}, nil
	}
	if *which && flags.NFlag() > 1 {
		return nil, mistaken("-version goes with no other flag")
	}
	if flags.NArg() > 0 {
		return nil, mistaken("unexpected argument %q; -help lists the flags", flags.Arg(0))
	}
	if *which {
		return &config{version: true}, nil
	}
	var empty string
	flags.Visit(func(f *flag.Flag) {
		if f.Value.String() == "" {
			empty = f.Name
		}
	})
	if empty != "" {
		return nil, mistaken("-%s is empty; leave it out, or give it a value", empty)
	}
	if *format != "text" && *format != "json" {
		return nil, mistaken("-log %q: must be text or json", *format)
	}
	var c *config
	if *file != "" {
		var err error
		if c, err = loadConfig(*file, *id); err != nil {
			return nil, err
		}
		c.file, c.join = *file, *join
		if *join && len(c.Cluster.Nodes) < 2 {
			return nil, mistaken("%s: Cluster.Nodes: lists this node alone; with -join, list a node of the cluster, too", *file)
		}
	} else if *join {
		return nil, mistaken("-join goes with -config")
	} else {
		c = defaults()
		c.Cluster.NodeId = cmp.Or(*id, "node1")
		c.Cluster.Nodes = []nodeConfig{{Id: c.Cluster.NodeId, Address: "127.0.0.1", ApiPort: 5000, RaftPort: 5001}}
		if !nodeID.MatchString(c.Cluster.NodeId) {
			return nil, mistaken("-node %q: must match %s", c.Cluster.NodeId, nodeID)
		}
		c.keyIn = "admin.key"
		// Nobody has it: the only node calls nobody, and others of this machine reach its Raft port too.
		c.secrets = []secret{newSecret()}
	}
	if c.join && *restore != "" {
		return nil, mistaken("-restore begins a cluster and -join does not; leave one out")
	}
	if *checks && *restore != "" {
		return nil, mistaken("-check says what a start would do, and -restore starts no node; leave one out")
	}
	c.args, c.file, c.format, c.restore, c.checks = args, *file, *format, *restore, *checks
	c.Storage.DataPath = cmp.Or(*data, c.Storage.DataPath)
	return c, nil
}

func defaults() *config {
	c := &config{}
	c.Cluster.LowerElectionTimeout = 300
	c.Cluster.RequestTimeout = 5000
	c.Cluster.MaxStaleness = 5000
	c.Storage.DataPath = "./data"
	c.Storage.MinFreeMiB = 256
	c.Limits.MaxValueBytes = 1 << 20
	c.Limits.MaxBodyBytes = 2 << 20
	c.Limits.MaxHeaderBytes = 64 << 10
	c.Limits.MaxConnections = 16384
	c.Limits.MaxStreams = 12288
	c.Limits.MaxStreamsPerKey = 8192
	c.Limits.AuthFailuresPerMinute = 6000
	return c
}

// nodeID is what a node may be called. It names a directory.
var nodeID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// loadConfig reads a configuration file, checked whole. id, if not empty, replaces
// Cluster.NodeId. Errors name file and member, on one line.
func loadConfig(path, id string) (*config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, mistaken("%v", err)
	}
	c := defaults()
	err = json.Unmarshal(b, c, json.MatchCaseInsensitiveNames(true), json.RejectUnknownMembers(true))
	if err != nil {
		return nil, mistaken("%s: %s", path, explain(err, b))
	}
	if at, ok := firstNull(b); ok {
		return nil, mistaken("%s: %s: null; leave it out, or give it a value", path, memberName(at))
	}
	c.Cluster.NodeId = cmp.Or(id, c.Cluster.NodeId)
	if err := c.check(); err != nil {
		return nil, mistaken("%s: %v", path, err)
	}
	return c, nil
}

// firstNull finds a member that is null. The decoder takes it for one that is missing, and a key
// whose limits are missing has none.
func firstNull(b []byte) (at jsontext.Pointer, ok bool) {
	d := jsontext.NewDecoder(bytes.NewReader(b))
	for {
		tok, err := d.ReadToken()
		if err != nil {
			return "", false
		}
		if tok.Kind() == 'n' {
			return d.StackPointer(), true
		}
	}
}

// memberName is a place in the file as the manual names it.
func memberName(p jsontext.Pointer) string {
	s := ""
	for t := range p.Tokens() {
		if _, err := strconv.Atoi(t); err == nil {
			s += "[" + t + "]"
		} else {
			s += "." + t
		}
	}
	return cmp.Or(strings.TrimPrefix(s, "."), "the document")
}

// explain says where in the file the decoder stumbled.
func explain(err error, b []byte) string {
	line := func(offset int64) int { return 1 + bytes.Count(b[:min(offset, int64(len(b)))], []byte("\n")) }
	var sem *json.SemanticError
	var syn *jsontext.SyntacticError
	switch {
	case errors.As(err, &sem):
		at := fmt.Sprintf("line %d: %s", line(sem.ByteOffset), memberName(sem.JSONPointer))
		switch {
		case errors.Is(err, json.ErrUnknownName) && strings.EqualFold(memberName(sem.JSONPointer), "Cluster.members"):
			return at + ": this form is no longer read; list the nodes in Cluster.Nodes"
		case errors.Is(err, json.ErrUnknownName):
			return at + ": unknown member"
		}
		return fmt.Sprintf("%s: wrong kind of value (%s)", at, sem.JSONKind)
	case errors.As(err, &syn):
		if errors.Is(err, jsontext.ErrDuplicateName) {
			return fmt.Sprintf("line %d: %s: given twice", line(syn.ByteOffset), memberName(syn.JSONPointer))
		}
		return fmt.Sprintf("line %d: not JSON: %s", line(syn.ByteOffset), strings.TrimPrefix(syn.Err.Error(), "jsontext: "))
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return "not JSON: it ends early"
	}
	return err.Error()
}

// check finds the first mistake; its error begins with the member's name.
func (c *config) check() error {
	cl := &c.Cluster
	if len(cl.Nodes) == 0 {
		return errors.New("Cluster.Nodes: missing; list every node with Id, Address, ApiPort and RaftPort")
	}
	ids, ports := map[string]int{}, map[string]string{}
	for i, n := range cl.Nodes {
		at := fmt.Sprintf("Cluster.Nodes[%d]", i)
		if !nodeID.MatchString(n.Id) {
			return fmt.Errorf("%s.Id: %q must match %s", at, n.Id, nodeID)
		}
		// Ids name directories, and file systems exist that ignore case.
		if j, ok := ids[strings.ToLower(n.Id)]; ok {
			return fmt.Errorf("%s.Id: %q is the id of Cluster.Nodes[%d] too", at, n.Id, j)
		}
		ids[strings.ToLower(n.Id)] = i
		if err := checkHost(n.Address); err != nil {
			return fmt.Errorf("%s.Address: %w", at, err)
		}
		for _, p := range []struct {
			name string
			port int
		}{{"ApiPort", n.ApiPort}, {"RaftPort", n.RaftPort}} {
			if p.port < 1 || p.port > 65535 {
				return fmt.Errorf("%s.%s: %d must be 1 to 65535", at, p.name, p.port)
			}
			addr := hostPort(strings.ToLower(n.Address), p.port)
			if other, ok := ports[addr]; ok {
				return fmt.Errorf("%s.%s: %s is the address of %s too", at, p.name, addr, other)
			}
			ports[addr] = at + "." + p.name
		}
	}
	if cl.NodeId == "" {
		return errors.New("Cluster.NodeId: missing; give it here or with -node")
	}
	if c.self().Id == "" {
		return fmt.Errorf("Cluster.NodeId: %q is not one of Cluster.Nodes", cl.NodeId)
	}
	if cl.Listen != "" && net.ParseIP(cl.Listen) == nil {
		if err := checkHost(cl.Listen); err != nil {
			return fmt.Errorf("Cluster.Listen: %w", err)
		}
	}
	for _, t := range []struct {
		name       string
		value, low int
	}{
		{"LowerElectionTimeout", cl.LowerElectionTimeout, 10},
		{"RequestTimeout", cl.RequestTimeout, 100},
		{"MaxStaleness", cl.MaxStaleness, 100},
	} {
		if t.value < t.low || t.value > 600_000 {
			return fmt.Errorf("%s: %d must be %d to 600000 milliseconds", "Cluster."+t.name, t.value, t.low)
		}
	}
	if cl.UpperElectionTimeout == 0 {
		cl.UpperElectionTimeout = 2 * cl.LowerElectionTimeout
	}
	if cl.UpperElectionTimeout != 2*cl.LowerElectionTimeout {
		return fmt.Errorf("Cluster.UpperElectionTimeout: %d must be twice LowerElectionTimeout, %d", cl.UpperElectionTimeout, 2*cl.LowerElectionTimeout)
	}
	var err error
	if c.secrets, err = c.readSecrets(); err != nil {
		return err
	}
	if c.Storage.DataPath == "" {
		return errors.New("Storage.DataPath: empty; leave it out for ./data")
	}
	if c.Storage.MinFreeMiB < 1 || c.Storage.MinFreeMiB > 1<<30 {
		return fmt.Errorf("Storage.MinFreeMiB: %d must be 1 to %d", c.Storage.MinFreeMiB, 1<<30)
	}
	if len(c.Auth.ApiKeys) == 0 {
		return errors.New("Auth.ApiKeys: missing; without a key nobody can use the API")
	}
	keys := map[[sha256.Size]byte]int{}
	for i := range c.Auth.ApiKeys {
		digest, err := c.Auth.ApiKeys[i].check(fmt.Sprintf("Auth.ApiKeys[%d]", i))
		if err != nil {
			return err
		}
		if j, ok := keys[digest]; ok {
			return fmt.Errorf("Auth.ApiKeys[%d].Key: the same key as that of Auth.ApiKeys[%d]", i, j)
		}
		keys[digest] = i
	}
	if err := c.checkAudit(); err != nil {
		return err
	}
	if err := c.checkLimits(); err != nil {
		return err
	}
	if err := c.readProxies(); err != nil {
		return err
	}
	return c.checkTls()
}

// onLoopback reports whether no other machine can reach the nodes, as far as the file says.
func (c *config) onLoopback() bool {
	hosts := []string{cmp.Or(c.Cluster.Listen, "localhost")}
	for _, n := range c.Cluster.Nodes {
		hosts = append(hosts, n.Address)
	}
	return !slices.ContainsFunc(hosts, func(host string) bool {
		ip := net.ParseIP(host)
		return ip == nil && !strings.EqualFold(host, "localhost") || ip != nil && !ip.IsLoopback()
	})
}

// checkHost refuses an address by which other nodes cannot find this one.
func checkHost(host string) error {
	if host == "" {
		return errors.New("missing")
	}
	if ip := net.ParseIP(host); ip != nil {
		if ip.IsUnspecified() {
			return fmt.Errorf("%s is no node's own address; listen on it with Cluster.Listen", host)
		}
		return nil
	}
	if len(host) > 253 || !hostName.MatchString(host) {
		return fmt.Errorf("%q is neither an IP address nor a host name", host)
	}
	return nil
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?$`)

// ownKey gives a node without a configuration file its admin key, made at the first start
// and kept in dir. made says that this is that start.
func (c *config) ownKey(dir string) (made bool, err error) {
	if c.keyIn == "" {
		return false, nil
	}
	c.keyIn = filepath.Join(dir, c.keyIn)
	b, err := os.ReadFile(c.keyIn)
	if os.IsNotExist(err) {
		b = []byte(newKey() + "\n")
		made, err = true, writeFileSync(c.keyIn, b)
	}
	if err != nil {
		return false, err
	}
	key := strings.TrimSpace(string(b))
	if key == "" {
		return false, fmt.Errorf("%s is empty; remove it and a new key is made", c.keyIn)
	}
	c.Auth.ApiKeys = []apiKey{{Key: key, Name: "admin", Principal: "admin", Role: "admin"}}
	return made, nil
}

// greet tells who starts a node without a configuration file how to use it, once it can
// be used.
func (c *config) greet(ctx context.Context, w io.Writer, n *raftNode, made bool) {
	if c.keyIn == "" {
		return
	}
	for !n.leads() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Millisecond): // the pace of the question
		}
	}
	if !made {
		fmt.Fprintf(w, "admin key in %s\n", c.keyIn)
		return
	}
	key := c.Auth.ApiKeys[0].Key
	_, api := n.leader()
	fmt.Fprintf(w, "admin key %s, kept in %s\ntry:\n", key, c.keyIn)
	fmt.Fprintf(w, "curl -X PUT -H 'X-API-Key: %s' -d '{\"value\":\"hello\"}' %s/api/v1/config/demo/greeting\n", key, api)
}
