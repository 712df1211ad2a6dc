package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// A certificate is the API's: the files of Tls.Cert and Tls.Key as they were when they last fitted
// together.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger
	pair              atomic.Pointer[tls.Certificate]
	loaded            string // the files when they were last looked into, see version; watch's own
}

// certificateEvery is how often the files are looked at.
const certificateEvery = time.Second

// openCertificate reads the pair; its error begins with the member that is wrong.
func openCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	c.loaded = c.version()
	pair, err := readPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	c.use(pair)
	return c, nil
}

// readPair reads a certificate chain and its key. The error begins with the member that is wrong.
func readPair(certFile, keyFile string) (*tls.Certificate, error) {
	chain, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("Tls.Cert: %w", err)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("Tls.Key: %w", err)
	}
	rest, some := chain, false
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("Tls.Cert: %s: %w", certFile, err)
		}
		some = true
	}
	if !some {
		return nil, fmt.Errorf("Tls.Cert: %s holds no certificate in PEM", certFile)
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("Tls.Key: %s: %w", keyFile, err)
	}
	return &pair, nil
}

// use answers with the pair from now on.
func (c *certificate) use(pair *tls.Certificate) {
	c.pair.Store(pair)
	leaf := pair.Leaf
	c.log.Info("certificate of the API", "subject", leaf.Subject.String(), "serial", leaf.SerialNumber.Text(16), "notAfter", leaf.NotAfter)
	c.warn()
}

// warn says what is wrong with the pair that is used.
func (c *certificate) warn() {
	leaf := c.pair.Load().Leaf
	if time.Now().After(leaf.NotAfter) {
		c.log.Error("the certificate of the API has expired; clients refuse it", "notAfter", leaf.NotAfter)
	}
	if st, err := os.Stat(c.keyFile); err == nil && st.Mode().Perm()&0o007 != 0 {
		c.log.Warn("everyone can read the key of the API; chmod o= " + c.keyFile)
	}
}

// warnPlain says that an API without a certificate listens where others can hear it.
func warnPlain(log *slog.Logger, at *net.TCPAddr) {
	if !at.IP.IsLoopback() {
		log.Warn("the API is served as plain text: keys and values can be read on the way; set Tls", "address", at.String())
	}
}

// version tells whether the files are those that were read: a file that is written anew has another
// time, one that is put in its place another number.
func (c *certificate) version() (v string) {
	for _, name := range []string{c.certFile, c.keyFile} {
		st, err := os.Stat(name)
		if err != nil {
			v += err.Error() + "\n"
			continue
		}
		inode := uint64(0)
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			inode = sys.Ino
		}
		v += fmt.Sprintln(st.ModTime().UnixNano(), st.Size(), inode)
	}
	return v
}

// watch reads the files again when they have changed and stayed as they are for one look, for the
// one is written before the other. Where they do not fit together, the old pair stays and the log says
// so, once. It runs until ctx is over.
func (c *certificate) watch(ctx context.Context) {
	tick := time.NewTicker(certificateEvery)
	defer tick.Stop()
	seen := c.loaded
	expired := time.Now().After(c.pair.Load().Leaf.NotAfter) // and the log says so
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if end := c.pair.Load().Leaf.NotAfter; !expired && time.Now().After(end) {
			expired = true
			c.log.Error("the certificate of the API has expired; clients refuse it", "notAfter", end)
		}
		now := c.version()
		if now == seen && now != c.loaded {
			c.loaded = now
			if pair, err := readPair(c.certFile, c.keyFile); err != nil {
				c.log.Error("the new certificate of the API is not used; the old one stays", "error", err)
			} else {
				c.use(pair)
				expired = time.Now().After(pair.Leaf.NotAfter)
			}
		}
		seen = now
	}
}

// config is for the API's server.
func (c *certificate) config() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.pair.Load(), nil },
	}
}

// checkTls refuses half a pair. The files are read by openCertificate: what they hold is no mistake of the
// configuration, and keeps no key from being revoked by SIGHUP while they are written anew.
func (c *config) checkTls() error {
	t := c.Tls
	switch {
	case t.Cert == "" && t.Key == "":
		return nil
	case t.Cert == "":
		return errors.New("Tls.Cert: missing; it goes with Tls.Key")
	case t.Key == "":
		return errors.New("Tls.Key: missing; it goes with Tls.Cert")
	}
	return nil
}

// scheme is that of the API's URLs.
func (c *config) scheme() string {
	if c.Tls.Cert != "" {
		return "https://"
	}
	return "http://"
}
