package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"sync/atomic"
	"time"
)

// markForwarded is the header of a write that another node passes on; its value is that
// node's id.
const markForwarded = "Confman-Forwarded"

// markDeadline goes with it: when the forwarding node gives up, in nanoseconds since 1970 on
// the leader's clock. A leader that was paused must not propose what its sender has
// given up.
const markDeadline = "Confman-Deadline"

// marksSize is how many bytes more than its client's the head of a forwarded write may have: for these
// marks, and because net/http is not exact about the limit. A quarter comes on top: net/http writes "a:"
// as "A: ".
const marksSize = 8 << 10

// betweenNodes is the key, in the context of a request that came over the raft port, of its
// *peerConn.
type betweenNodes struct{}

// serveNodes lets the server answer what other nodes forward to this one.
func (s *server) serveNodes() {
	h := http.HandlerFunc(s.ServeHTTP)
	s.node.api.Store(&h)
}

// deadline is when a write is given up.
func (c *call) deadline() time.Time {
	d := c.start.Add(c.s.cfg.requestTimeout())
	if c.r.Header[markForwarded] == nil {
		return d
	}
	// A client that makes this header up can only shorten its own time.
	if nanos, err := strconv.ParseInt(c.r.Header.Get(markDeadline), 10, 64); err == nil {
		if t := time.Unix(0, nanos); t.Before(d) {
			return t
		}
	}
	return d
}

// leaderDeadline says what leader's clock shows, at the earliest, when this node's shows
// deadline. It may need to ask the leader for the time.
func (n *raftNode) leaderDeadline(ctx context.Context, leader string, deadline time.Time) (int64, error) {
	r := n.leaderClock.Load()
	if r == nil || r.leader != leader {
		if _, err := n.leaderRevision(ctx, acknowledged); err != nil {
			return 0, err
		}
		if r = n.leaderClock.Load(); r == nil || r.leader != leader {
			return 0, errNoLeader.because("the leader has just changed; try again")
		}
	}
	// The reading is older than its arrival, so the leader's clock is ahead of this sum.
	return r.nanos + int64(deadline.Sub(r.here)), nil
}

// gate decides where a write goes. done says that it is answered; else this node serves it.
func (s *server) gate(c *call) (done bool, err error) {
	stage := s.stopping.Load()
	switch {
	case stage == draining:
		return false, errUnavailable.because("this node is shutting down; try again, here or on another node")
	case stage == serving && s.node.leads():
		return false, nil
	case c.r.Header[markForwarded] != nil:
		return false, errNoLeader.because("this node does not lead, and the write was forwarded already; try again")
	}
	id, api := s.node.leader()
	if id == "" || id == s.node.id {
		return false, errNoLeader.because("no leader is known; try again")
	}
	if stage == handedOver {
		c.w.Header()["Connection"] = []string{"close"}
	} else if s.cfg.Cluster.Forward && !c.spools() { // what fills a disk is not held in memory
		return true, s.forward(c, id)
	}
	c.w.Header()["Location"] = []string{api + c.r.URL.RequestURI()}
	return false, errNotLeader.because("this node follows; send the write to %s (curl -L does)", api)
}

// forward passes a write on to the leader's API with the caller's own key and headers, over the
// raft port, and answers what it says once this node has applied the write.
func (s *server) forward(c *call, leader string) error {
	if c.r.ContentLength != 0 && c.sent == nil { // a leader that has just stepped aside has read it
		if err := c.readBody(); err != nil {
			return err
		}
	}
	deadline := c.start.Add(s.cfg.requestTimeout())
	ctx, cancel := context.WithDeadline(c.r.Context(), deadline)
	defer cancel()
	until, err := s.node.leaderDeadline(ctx, leader, deadline)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, c.r.Method, "http://"+leader+c.r.URL.RequestURI(), bytes.NewReader(c.sent))
	if err != nil {
		return err
	}
	// A client that calls a header of ours hop-by-hop, If-Match say, does not get rid of it by that:
	// for it this node is the server, whichever leads.
	hop := map[string]bool{"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Te": true, "Trailer": true,
		"Transfer-Encoding": true, "Upgrade": true, "Expect": true, "Content-Length": true, "X-Correlation-Id": true,
		// Go's transport takes these for leave to send a write again when its connection breaks, and
		// the second answer would hide that the first was applied.
		"Idempotency-Key": true, "X-Idempotency-Key": true}
	for name, v := range c.r.Header {
		if !hop[name] {
			req.Header[name] = v
		}
	}
	if req.Header["User-Agent"] == nil {
		req.Header["User-Agent"] = []string{""} // send none rather than Go's
	}
	req.Header["X-Correlation-Id"] = []string{c.id}
	req.Header[markForwarded] = []string{s.node.id}
	req.Header[markSource] = []string{c.source()}
	req.Header[markDeadline] = []string{strconv.FormatInt(until, 10)}
	var connected atomic.Bool // from then on it may be on its way
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected.Store(true) }}
	resp, err := s.node.forwards.Load().RoundTrip(req.WithContext(httptrace.WithClientTrace(ctx, trace)))
	if err != nil {
		// Only what was not written at all is sent a second time, so a call that then fails says
		// that nothing was sent.
		var op *net.OpError
		if !connected.Load() || errors.As(err, &op) && op.Op == "dial" {
			return &problem{kind: errUnavailable, detail: "the leader was not reached in time; try again", cause: err}
		}
		return brokenHop(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, int64(6*s.cfg.Limits.MaxValueBytes+64<<10)))
	if err != nil {
		return brokenHop(err)
	}
	if resp.StatusCode < 300 {
		rev, err := strconv.ParseUint(resp.Header.Get("Confman-Revision"), 10, 64)
		if err != nil {
			return brokenHop(fmt.Errorf("leader %s: Confman-Revision: %w", leader, err))
		}
		if !s.store.waitFor(ctx, rev) {
			return errUnknown.because("the leader made the write as revision %d, but this node has not applied it in time", rev)
		}
	}
	h := c.w.Header()
	for _, name := range []string{"Content-Type", "Etag", "Retry-After", "Www-Authenticate", "Allow"} {
		if v := resp.Header[name]; v != nil {
			h[name] = v
		}
	}
	c.sawRevision(s.store.at().rev)
	if resp.StatusCode != http.StatusNoContent {
		h["Content-Length"] = []string{strconv.Itoa(len(answer))}
	}
	c.w.WriteHeader(resp.StatusCode)
	return c.write(answer)
}

func brokenHop(err error) error {
	return &problem{kind: errUnknown, cause: err,
		detail: "the connection to the leader broke with the write under way; it may or may not be made: repeat it conditionally, or settle it by its correlation id in the audit trail"}
}
