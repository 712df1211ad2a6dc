package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// describe is -check: it writes what a start with this configuration would do on this machine, a fact a
// line, then the warnings that the start would log. It makes, locks and listens on nothing. The error is the
// one that the start would end with; a port that this node itself holds, because it runs, is none.
func (c *config) describe(w io.Writer) error {
	var failed error // the first, in the order of run
	fail := func(err error) error {
		failed = cmp.Or(failed, err)
		return err
	}
	say := func(what, format string, args ...any) { fmt.Fprintf(w, what+": "+format+"\n", args...) }
	log := slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))

	me := c.self()
	dir := filepath.Join(c.Storage.DataPath, me.Id)
	say("program", "confman %s", version())
	say("file", "%s", cmp.Or(c.file, "none, a cluster of one node"))
	say("node", "%s", me.Id)
	holder := lockHolder(filepath.Join(dir, "lock"))
	host := cmp.Or(c.Cluster.Listen, me.Address)
	for _, p := range []struct {
		what string
		port int
	}{{"api", me.ApiPort}, {"raft", me.RaftPort}} {
		at := hostPort(host, p.port)
		switch err := bindable(at); {
		case err == nil:
			say("listens", "%s %s", p.what, at)
		case holder != 0:
			say("listens", "%s %s, in use", p.what, at)
		default:
			say("listens", "%s %s, which fails", p.what, at)
			fail(err)
		}
	}
	var cert *certificate
	if c.Tls.Cert != "" {
		var err error
		if cert, err = openCertificate(c.Tls.Cert, c.Tls.Key, slog.New(slog.DiscardHandler)); err != nil {
			say("certificate", "%s, which fails", c.Tls.Cert)
			fail(mistaken("%s: %v", c.file, err))
		} else {
			leaf := cert.pair.Load().Leaf
			say("certificate", "%s, %s, until %s", c.Tls.Cert, leaf.Subject, leaf.NotAfter.Format(time.RFC3339))
		}
	}
	fail(c.describeData(dir, holder, say))
	for _, n := range c.Cluster.Nodes {
		say("member", "%s %s%s, raft %s", n.Id, c.scheme(), hostPort(n.Address, n.ApiPort), hostPort(n.Address, n.RaftPort))
	}
	say("quorum", "%d of %d", len(c.Cluster.Nodes)/2+1, len(c.Cluster.Nodes))
	switch {
	case c.file == "":
		say("transport", "none, there is no other node")
	case len(c.secrets) == 0:
		say("transport", "plaintext")
	default:
		say("transport", "tls, secrets: %d", len(c.secrets))
	}
	for _, k := range c.Auth.ApiKeys {
		of, until := "all", ""
		if k.Namespaces != nil {
			of = strings.Join(k.Namespaces, " ")
		}
		switch {
		case k.notAfter.IsZero():
		case time.Now().After(k.notAfter):
			until = ", expired " + *k.NotAfter
		default:
			until = ", until " + *k.NotAfter
		}
		say("key", "%q, %s, actor %q, namespaces: %s%s", k.Name, k.Role, k.actor(), of, until)
	}
	if c.keyIn != "" {
		made := "kept in"
		if _, err := os.Stat(filepath.Join(dir, c.keyIn)); os.IsNotExist(err) {
			made = "to be made in"
		}
		say("key", "\"admin\", admin, actor \"admin\", namespaces: all, %s %s", made, filepath.Join(dir, c.keyIn))
	}
	c.describeSettings(say)

	c.warn(log)
	if cert != nil {
		cert.log = log
		cert.warn()
	} else if at, err := net.ResolveTCPAddr("tcp", hostPort(host, me.ApiPort)); err == nil {
		warnPlain(log, at)
	}
	c.connections(log)
	c.warnPlaintext(log)
	c.warnNames(log)
	if d := newDisk(existing(dir), uint64(c.Storage.MinFreeMiB)<<20, log, nil); d.lowForLeader() {
		d.sayLow()
	}
	return failed
}

// describeData says what is in the data directory and what becomes of it; holder is the process that
// holds it, or 0.
func (c *config) describeData(dir string, holder int, say func(what, format string, args ...any)) error {
	there := existing(dir)
	if err := unix.Access(there, unix.W_OK|unix.X_OK); err != nil {
		say("data", "%s, which fails", dir)
		return &os.PathError{Op: "write in", Path: there, Err: err}
	}
	fi, err := os.Stat(there)
	if err == nil && !fi.IsDir() {
		err = &os.PathError{Op: "mkdir", Path: there, Err: syscall.ENOTDIR}
	}
	if err != nil {
		say("data", "%s, which fails", dir)
		return err
	}
	if there != dir {
		say("data", "%s, to be made", dir)
		return nil
	}
	if holder != 0 {
		say("data", "%s, in use by process %d", dir, holder)
		return nil
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	// What is left of raft tells a node that goes on from one that is new, or lost its data.
	if !slices.ContainsFunc(names, func(d os.DirEntry) bool { return d.Name() == "raft.db" || d.Name() == "snapshots" }) {
		say("data", "%s, without data", dir)
		return nil
	}
	say("data", "%s, of an earlier start", dir)
	how, _, err := howState(dir)
	if err == nil {
		say("state", "%s", how)
	}
	return err
}

// describeSettings says what the file, or a flag, sets otherwise than it is without it.
func (c *config) describeSettings(say func(what, format string, args ...any)) {
	own, unset := reflect.ValueOf(*c), reflect.ValueOf(*defaults())
	// These are said elsewhere, or follow from another.
	said := []string{"Cluster.NodeId", "Cluster.Nodes", "Cluster.Listen", "Cluster.UpperElectionTimeout", "Storage.DataPath", "Tls.Cert", "Tls.Key"}
	for _, name := range differences("", unset, own) {
		if slices.Contains(said, name) {
			continue
		}
		a, b := unset, own
		for part := range strings.SplitSeq(name, ".") {
			a, b = a.FieldByName(part), b.FieldByName(part)
		}
		if a.Kind() == reflect.Slice {
			say("setting", "%s %v", name, b)
		} else {
			say("setting", "%s %v, default %v", name, b, a)
		}
	}
}

// warnNames says which names of the file lead to no address.
func (c *config) warnNames(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, n := range c.Cluster.Nodes {
		if net.ParseIP(n.Address) != nil {
			continue
		}
		if _, err := net.DefaultResolver.LookupHost(ctx, n.Address); err != nil {
			log.Warn("a node's name does not resolve", "id", n.Id, "address", n.Address, "error", err)
		}
	}
}

// existing is dir, or the nearest directory above it that is there.
func existing(dir string) string {
	for _, err := os.Stat(dir); os.IsNotExist(err) && dir != filepath.Dir(dir); _, err = os.Stat(dir) {
		dir = filepath.Dir(dir)
	}
	return dir
}

// lockHolder is the process that holds the flock of a file, as far as the kernel shows it to this one; else 0.
func lockHolder(path string) (pid int) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer f.Close()
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for s := bufio.NewScanner(f); s.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 9300 fe:00:10207727 0 EOF; of one that waits, -> stands before FLOCK.
		if p := strings.Fields(s.Text()); len(p) > 5 && p[1] == "FLOCK" && p[5] == file {
			fmt.Sscan(p[4], &pid)
		}
	}
	return pid
}

// bindable is the error with which listening on address fails. It binds and does not listen, which is in
// nobody's way: a process that listens there meanwhile can.
func bindable(address string) error {
	at, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return &net.OpError{Op: "listen", Net: "tcp", Err: err}
	}
	family, name := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: at.Port, Addr: [16]byte(at.IP.To16())})
	if v4 := at.IP.To4(); v4 != nil {
		family, name = unix.AF_INET, &unix.SockaddrInet4{Port: at.Port, Addr: [4]byte(v4)}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return &net.OpError{Op: "listen", Net: "tcp", Addr: at, Err: os.NewSyscallError("socket", err)}
	}
	defer unix.Close(fd)
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // as a listener of Go does
	if err == nil {
		err = unix.Bind(fd, name)
	}
	if err != nil {
		return &net.OpError{Op: "listen", Net: "tcp", Addr: at, Err: os.NewSyscallError("bind", err)}
	}
	return nil
}
