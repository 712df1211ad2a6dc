package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// writeCertificate makes a certificate of its own for 127.0.0.1 and writes it and its key to dir, as
// Tls.Cert and Tls.Key.
func writeCertificate(tb testing.TB, dir string, serial int64) (certFile, keyFile string) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "confman"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP("127.0.0.1")}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	text, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "api.crt"), filepath.Join(dir, "api.key")
	writeFile(tb, certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	writeFile(tb, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text}))
	return certFile, keyFile
}

func writeFile(tb testing.TB, path string, b []byte) {
	tb.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		tb.Fatal(err)
	}
}

// withTLS serves the API of a cluster with the pair in dir.
func withTLS(certFile, keyFile string) edit {
	return func(doc map[string]any) { doc["Tls"] = map[string]any{"Cert": certFile, "Key": keyFile} }
}

// serial is the serial number of the certificate that a node shows; its other errors are of the handshake.
func (n *node) serial(roots *x509.CertPool) (int64, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", n.api, &tls.Config{RootCAs: roots, InsecureSkipVerify: roots == nil})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(), nil
}

// TestTLS: with Tls the API speaks TLS 1.2 or more and HTTP/1.1, redirects lead to it, and streams and
// waits are as they are without.
func TestTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := writeCertificate(t, dir, 1)
	chain, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(chain)

	c := newCluster(t, 3, withTLS(certFile, keyFile))
	for _, n := range c.nodes {
		n.url = "https://" + n.api
	}
	c.start()
	leader, follower := c.leader(), c.followers()[0]
	strict := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}}
	defer strict.CloseIdleConnections()
	a, err := doWith(strict, "PUT", follower.url+keyPath("app", "k"), adminKey, `{"value":"v"}`)
	if err != nil || a.status != http.StatusCreated {
		t.Errorf("a write that a follower sends on: %v, %v", a, err)
	}
	if a, err = do("PUT", follower.url+keyPath("app", "k"), adminKey, `{"value":"w"}`); err != nil || a.header.Get("Location") != leader.url+keyPath("app", "k") {
		t.Errorf("a follower answers %v with Location %q (%v), want %s", a, a.header.Get("Location"), err, leader.url)
	}
	if _, st, err := follower.status(); err != nil || st.Leader != leader.url {
		t.Errorf("the leader is %q (%v), want %s", st.Leader, err, leader.url)
	}

	for _, m := range []struct {
		low, high uint16
		ok        bool
	}{{tls.VersionTLS10, tls.VersionTLS11, false}, {tls.VersionTLS12, tls.VersionTLS12, true}, {tls.VersionTLS13, tls.VersionTLS13, true}} {
		conn, err := tls.Dial("tcp", leader.api, &tls.Config{RootCAs: roots, MinVersion: m.low, MaxVersion: m.high, NextProtos: []string{"h2", "http/1.1"}})
		if (err == nil) != m.ok {
			t.Errorf("%s: %v", tls.VersionName(m.high), err)
		}
		if err == nil {
			if p := conn.ConnectionState().NegotiatedProtocol; p != "http/1.1" {
				t.Errorf("the protocol is %q", p)
			}
			conn.Close()
		}
	}
	if a, err := do("GET", "http://"+leader.api+"/health", "", ""); err != nil || a.status != http.StatusBadRequest {
		t.Errorf("plain text is answered with %v, %v", a, err)
	}

	s, a, err := openStream(leader, "app", "?since=0")
	if err != nil || s == nil {
		t.Fatalf("a stream: %v, %v", a, err)
	}
	defer s.close()
	if f, err := s.next(); err != nil || f.event != "config.set" {
		t.Errorf("the stream: %v, %v", f, err)
	}
	waited := make(chan error, 1)
	go func() {
		a, err := do("GET", leader.url+keyPath("app", "k")+"?wait=9s", readerKey, "", "If-None-Match", `"1"`)
		if err == nil && a.status != http.StatusOK {
			err = errors.New(a.String())
		}
		waited <- err
	}()
	leader.put(t, "app", "k", "x")
	if err := <-waited; err != nil {
		t.Errorf("a wait: %v", err)
	}
}

// TestCertificateReload: new files are used without a restart and without a failed handshake; a pair
// that does not fit is not used, and said once.
func TestCertificateReload(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := writeCertificate(t, dir, 1)
	c := newCluster(t, 1, withTLS(certFile, keyFile))
	n := c.nodes[0]
	n.url = "https://" + n.api
	c.expects = append(c.expects, "the new certificate of the API is not used")
	c.start()
	shows := func(want int64) {
		t.Helper()
		until(t, 10*time.Second, func() error {
			got, err := n.serial(nil)
			if err != nil {
				t.Errorf("a handshake: %v", err)
			}
			if got != want {
				return fmt.Errorf("it shows certificate %d, want %d", got, want)
			}
			return nil
		})
	}
	shows(1)
	writeCertificate(t, dir, 2) // in place
	shows(2)
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	cert3, key3 := writeCertificate(t, other, 3)
	refused := func() int { return strings.Count(n.logged(), "the new certificate of the API is not used") }
	if err := os.Rename(cert3, certFile); err != nil { // the key is still that of 2
		t.Fatal(err)
	}
	until(t, 10*time.Second, func() error {
		if refused() == 0 {
			return errors.New("the log does not say that the pair does not fit")
		}
		return nil
	})
	shows(2)
	if err := os.Rename(key3, keyFile); err != nil {
		t.Fatal(err)
	}
	shows(3)
	if got := refused(); got != 1 {
		t.Errorf("the log says %d times that a pair is not used", got)
	}
}

// TestTLSMistakes: what cannot be served is refused at the start, by the name of the member.
func TestTLSMistakes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert1, key1 := writeCertificate(t, dir, 1)
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	_, key2 := writeCertificate(t, other, 2)
	broken := filepath.Join(dir, "broken")
	writeFile(t, broken, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	for _, m := range []struct{ cert, key, want string }{
		{cert1, "", "Tls.Key: missing"},
		{"", key1, "Tls.Cert: missing"},
		{filepath.Join(dir, "none"), key1, "Tls.Cert: open"},
		{cert1, filepath.Join(dir, "none"), "Tls.Key: open"},
		{key1, key1, "Tls.Cert:"},
		{broken, key1, "Tls.Cert:"},
		{cert1, cert1, "Tls.Key:"},
		{cert1, key2, "Tls.Key:"},
		{dir, key1, "Tls.Cert:"},
	} {
		c := newCluster(t, 1, withTLS(m.cert, m.key))
		code, stdout, stderr := runNode(t, dir, c.nodes[0].args...)
		if code != 2 || stdout != "" {
			t.Errorf("%v: exit status %d, standard output %q", m, code, stdout)
		}
		wantOneLine(t, stderr, "cluster.json", m.want)
	}
}

// TestPlainTextWarning: an API in plain text where others may listen is a warning at every start; on
// loopback, or with TLS, it is none.
func TestPlainTextWarning(t *testing.T) {
	t.Parallel()
	certFile, keyFile := writeCertificate(t, t.TempDir(), 1)
	for _, m := range []struct {
		name  string
		edits []edit
		warns int
	}{
		{"loopback", nil, 0},
		{"everywhere", []edit{with("Cluster", "Listen", "0.0.0.0")}, 2},
		{"everywhere with TLS", []edit{with("Cluster", "Listen", "0.0.0.0"), withTLS(certFile, keyFile)}, 0},
	} {
		c := newCluster(t, 1, m.edits...)
		n := c.nodes[0]
		if strings.Contains(m.name, "TLS") {
			n.url = "https://" + n.api
		}
		c.start()
		n.stop()
		c.start()
		if got := strings.Count(n.logged(), "the API is served as plain text"); got != m.warns {
			t.Errorf("%s: %d warnings in two starts, want %d", m.name, got, m.warns)
		}
	}
}

// TestHandshakesInLog: strangers who do not finish a handshake are cut, and do not fill the log.
func TestHandshakesInLog(t *testing.T) {
	t.Parallel()
	certFile, keyFile := writeCertificate(t, t.TempDir(), 1)
	c := newCluster(t, 1, withTLS(certFile, keyFile))
	n := c.nodes[0]
	n.url = "https://" + n.api
	c.start()
	silent, err := net.Dial("tcp", n.api)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	start := time.Now()
	for range 3 * addressLines {
		conn, err := net.Dial("tcp", n.api)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "GET / HTTP/1.1\r\n\r\n")
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	if lines := strings.Count(n.logged(), "TLS handshake error"); lines < 1 || lines > addressLines {
		t.Errorf("%d lines about handshakes, want at most %d", lines, addressLines)
	}
	silent.SetDeadline(time.Now().Add(limit(15 * time.Second)))
	if b, err := io.ReadAll(silent); errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 0 {
		t.Errorf("a connection without a handshake is open after %v (%q)", time.Since(start), b)
	}
}

// TestManualCertificate: the manual's command makes a certificate that a node serves and curl trusts.
func TestManualCertificate(t *testing.T) {
	needs(t, "sh", "openssl", "curl")
	t.Parallel()
	dir := t.TempDir()
	command := "openssl req" + excerpt(t, "\nopenssl req", "\nchown")
	cmd := exec.Command("sh", "-c", strings.Replace(command, "IP:10.0.1.10", "IP:127.0.0.1", 1))
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	certFile, keyFile := filepath.Join(dir, "api.crt"), filepath.Join(dir, "api.key")
	c := newCluster(t, 1, withTLS(certFile, keyFile))
	n := c.nodes[0]
	n.url = "https://" + n.api
	c.start()
	if out, err := exec.Command("curl", "-sS", "--cacert", certFile, n.url+"/health/ready").CombinedOutput(); err != nil || !strings.Contains(string(out), `"ready"`) {
		t.Errorf("%v: %s", err, out)
	}
}

// TestRevokedWhileRenewed: SIGHUP takes a key away also while the files of the certificate do not fit.
func TestRevokedWhileRenewed(t *testing.T) {
	t.Parallel()
	const gone = "cm_test_gone_Qm4xZs8vUc1eRt"
	cert, key := writeCertificate(t, t.TempDir(), 1)
	c := newCluster(t, 1, addKey(gone, "Gone", "reader"), withTLS(cert, key))
	n := c.nodes[0]
	n.url = "https" + strings.TrimPrefix(n.url, "http")
	c.start()
	c.expects = append(c.expects, "the new certificate of the API is not used")
	writeFile(t, key, []byte("half of it"))
	c.configure(dropKey("Gone"))
	n.reload()
	if a, err := do("GET", n.url+"/api/v1/namespaces", gone, ""); err != nil || a.status != http.StatusUnauthorized {
		t.Errorf("a revoked key is answered %v, %v", a, err)
	}
}
