package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// A rawRequest is written to the wire as it stands. Go's client would clean the
// path, refuse the headers and mend the body that the scripts are about.
type rawRequest struct {
	addr, method, target string
	from                 string // our address; clientAddr if empty
	header               []string
	body                 []byte // nil for none
}

// value returns the value of the last header line of that name.
func (r *rawRequest) value(name string) (v string, ok bool) {
	for _, h := range r.header {
		if n, x, _ := strings.Cut(h, ":"); strings.EqualFold(n, name) {
			v, ok = strings.TrimSpace(x), true
		}
	}
	return v, ok
}

// A rawAnswer is a response whose body has been read.
type rawAnswer struct {
	*http.Response
	body []byte
}

// clientAddr is where scripts send from: not where nodes are, so that an event shows
// whose address its source is.
const clientAddr = "127.0.0.2"

// send makes the exchange on a connection of its own. A server may answer before
// it has read the body and close, so the writing side is not what decides.
func (r *rawRequest) send() (*rawAnswer, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(cmp.Or(r.from, clientAddr))}}
	conn, err := d.Dial("tcp", r.addr)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, err
	}
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(r.bytes())
		written <- err
	}()
	got, err := r.read(bufio.NewReader(conn))
	conn.Close() // ends a Write that nobody reads any more
	if werr := <-written; err != nil {
		return nil, errors.Join(err, werr)
	}
	return got, nil
}

// read reads the answer behind any interim ones.
func (r *rawRequest) read(br *bufio.Reader) (*rawAnswer, error) {
	for {
		resp, err := http.ReadResponse(br, &http.Request{Method: r.method})
		if err != nil {
			return nil, fmt.Errorf("no answer: %w", err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return nil, fmt.Errorf("half an answer: %w", err)
		}
		if resp.StatusCode >= 200 {
			return &rawAnswer{resp, body}, documented(r.method, r.target, &answer{resp.StatusCode, resp.Header, body})
		}
	}
}

// bytes is the request as it goes over the wire.
func (r *rawRequest) bytes() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", r.method, r.target)
	if _, ok := r.value("Host"); !ok {
		fmt.Fprintf(&b, "Host: %s\r\n", r.addr)
	}
	b.WriteString("Connection: close\r\n")
	for _, h := range r.header {
		b.WriteString(h + "\r\n")
	}
	switch _, chunked := r.value("Transfer-Encoding"); {
	case chunked:
		fmt.Fprintf(&b, "\r\n%x\r\n%s\r\n0\r\n\r\n", len(r.body), r.body)
	case r.body != nil:
		fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(r.body), r.body)
	default:
		b.WriteString("\r\n")
	}
	return b.Bytes()
}
