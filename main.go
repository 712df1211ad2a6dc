// Confman keeps configuration for distributed systems: one program that runs on every
// node of a small cluster, agrees by Raft and is used with curl.
//
//	confman [-config FILE] [-node ID] [-data DIR] [-log text|json] [-join]
//	confman -restore FILE [-config FILE] [-node ID] [-data DIR]
//	confman -check [-config FILE] [-node ID] [-data DIR]
//	confman -keygen [key|secret]
//	confman -version
//
// Without -config it is a cluster of one node on 127.0.0.1, with data in ./data and an
// admin key that it makes and prints. README.md is the manual.
//
// Begin reading at run, below, and at routes in http.go; each of the other files is about one
// thing. Handlers read the state in a transaction of their own, since a read is a lookup and a
// copy, so the files about what is stored import bbolt. hashicorp/raft is known to the files about
// the cluster: raft.go, transport.go, propose.go, reads.go, join.go, members.go,
// cluster.go, peers.go, disk.go and fsm.go.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	hup := make(chan os.Signal, 1) // first: until then the signal ends the process
	signal.Notify(hup, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	switch err := run(ctx, hup, os.Args[1:], os.Stdout); {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintf(os.Stderr, "confman: %s\n", flat(err))
		os.Exit(2)
	default:
		text := flat(err)
		if errors.Is(err, syscall.ENOSPC) && !strings.Contains(text, checkDisk) {
			text += "; " + checkDisk
		}
		fmt.Fprintf(os.Stderr, "confman: %s\n", text)
		os.Exit(1)
	}
}

// version is which program this is: the module's version, which the go command makes of the tag or the
// commit that it builds, or devel where it knows neither, as of go run and of a test.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "devel"
	}
	return info.Main.Version
}

// flat keeps an error on one line, whatever file names and values it quotes.
func flat(err error) string { return strings.ReplaceAll(err.Error(), "\n", " ") }

// run is the whole life of a node. It returns when ctx is cancelled and everything is
// closed, or when something that the node cannot live without fails; then nothing is
// closed, for the process is about to end and must not write any more. Each value from hup makes it
// read the configuration file again.
func run(ctx context.Context, hup <-chan os.Signal, args []string, stdout io.Writer) error {
	syscall.Umask(0o077) // raft's snapshot store makes files for everyone
	keepMemory()
	cfg, err := configure(args)
	if err != nil {
		return err
	}
	switch {
	case cfg.keygen != "":
		return keygen(stdout, cfg.keygen)
	case cfg.version:
		_, err := fmt.Fprintf(stdout, "confman %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return err
	case cfg.checks:
		return cfg.describe(stdout)
	case cfg.restore != "":
		return restoreNew(cfg, stdout)
	}
	log := cfg.logger()
	slog.SetDefault(log)
	cfg.warn(log)

	// Listen first: it finds out whether this node runs already, and the others may call.
	me := cfg.self()
	host := cmp.Or(cfg.Cluster.Listen, me.Address)
	api, err := net.Listen("tcp", hostPort(host, me.ApiPort))
	if err != nil {
		return err
	}
	peers, err := net.Listen("tcp", hostPort(host, me.RaftPort))
	if err != nil {
		return err
	}
	var cert *certificate
	if cfg.Tls.Cert != "" {
		if cert, err = openCertificate(cfg.Tls.Cert, cfg.Tls.Key, log); err != nil {
			return mistaken("%s: %v", cfg.file, err)
		}
	} else if at, ok := api.Addr().(*net.TCPAddr); ok {
		warnPlain(log, at)
	}
	dir := filepath.Join(cfg.Storage.DataPath, me.Id)
	if err := makeDir(dir); err != nil {
		return err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := checkFinished(dir); err != nil {
		return err
	}
	made, err := cfg.ownKey(dir)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := removeTemporary(dir); err != nil {
		return err
	}
	st, how, err := openStore(dir)
	if err != nil {
		return err
	}
	log.Info("state opened", "how", how, "revision", st.at().rev, "took", time.Since(start))
	// Opening reads the log, and may find that it cannot go on.
	var n *raftNode
	failed, opened := make(chan error, 1), make(chan error, 1)
	go func() {
		var err error
		n, err = startNode(cfg, dir, st, peers, log, failed)
		opened <- err
	}()
	select {
	case err = <-opened:
	case err = <-failed:
	}
	if err != nil {
		return err
	}

	s := newServer(cfg, st, n, log)
	door := newGate(api, cfg.connections(log))
	s.door = door
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       2 * time.Minute,
		WriteTimeout:      writeTime, // of what net/http answers itself; an answer of ours has its own
		MaxHeaderBytes:    cfg.Limits.MaxHeaderBytes,
		Protocols:         new(http.Protocols),
		// OPTIONS * is answered like any other target that is no path.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     stdlog.New(&s.refusals, "", 0),
		ConnState:                    door.note,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if t, ok := conn.(*tls.Conn); ok {
				conn = t.NetConn()
			}
			return context.WithValue(ctx, connKey{}, conn)
		},
	}
	// HTTP/2 would carry many streams in one connection, and what is said here of connections, slow
	// clients and deadlines would not hold.
	srv.Protocols.SetHTTP1(true)
	s.serveNodes()
	go s.keepKeys(hup)
	served := make(chan error, 1)
	if cert != nil {
		srv.TLSConfig = cert.config()
		go cert.watch(ctx)
		go func() { served <- srv.ServeTLS(door, "", "") }()
	} else {
		go func() { served <- srv.Serve(door) }()
	}
	fmt.Fprintf(stdout, "listening http=%s raft=%s\n", api.Addr(), peers.Addr())
	go cfg.greet(ctx, stdout, n, made)
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", api.Addr(), err)
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("shutting down")
	// ctx is over; saying goodbye needs a clock of its own. A node that fails while it does
	// so still fails.
	bye := make(chan error, 1)
	go func() { bye <- s.goodbye(srv) }()
	select {
	case err = <-bye:
	case err = <-failed:
	}
	return err
}

// keepMemory keeps what the process holds, keys among it, out of core dumps and from other processes of
// its user. Where a program takes the dumps, it is told no limit, so the process is marked as well.
func keepMemory() {
	syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
	unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// goodbye ends a node in the order that costs its clients least: no new write begins,
// those that are open end, another node leads and is named to whoever still writes here,
// and then all connections end.
func (s *server) goodbye(srv *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.requestTimeout()+5*time.Second)
	defer cancel()
	s.stopping.Store(draining)
	for s.writes.Load() > 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond) // the pace of the question; writes end by themselves
	}
	if len(s.node.voters(s.node.id)) > 0 {
		s.node.handOver()
		s.stopping.Store(handedOver)
		time.Sleep(500 * time.Millisecond) // the contract's half second
	}
	close(s.ending)
	err := srv.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		s.log.Warn("requests still open are cut")
		err = srv.Close()
	}
	return errors.Join(err, s.node.Close(), s.store.Close())
}

// makeDir makes a data directory that survives the machine: a file that is fsynced is lost all the
// same with a directory above it whose name is not on the disk. So dir and every directory in which
// it makes a name are fsynced, at least dir's parent, for an earlier start may have been cut off here.
func makeDir(dir string) error {
	there := filepath.Dir(dir) // the nearest that was there before
	for _, err := os.Stat(there); os.IsNotExist(err) && there != filepath.Dir(there); _, err = os.Stat(there) {
		there = filepath.Dir(there)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for ; dir != there; dir = filepath.Dir(dir) {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return syncDir(there)
}
