package main

import (
	"bytes"
	"net/http"
	"strconv"

	"go.etcd.io/bbolt"
)

// A page is an answer that lists items. It is put together inside a transaction and sent
// when that is over.
type page struct {
	limit, n int
	plain    bool // a line each, not JSON
	pooled   *[]byte
	buf      []byte
	next     string // cursor of the next page, empty at the end
}

// maxPage is the size at which a page ends early, in bytes.
const maxPage = 8 << 20

// newPage begins a page; a plain one holds lines of text.
func newPage(limit int, plain bool) *page {
	p := &page{limit: limit, plain: plain, pooled: getBuffer()}
	p.buf = (*p.pooled)[:0]
	if !plain {
		p.buf = append(p.buf, `{"items":[`...)
	}
	return p
}

// free gives the buffer back. Nothing of the page may be used any more.
func (p *page) free() {
	*p.pooled = p.buf
	putBuffer(p.pooled)
}

func (p *page) full() bool { return p.n == p.limit || len(p.buf) >= maxPage }

// add appends one item: JSON, or a line.
func (p *page) add(item []byte) {
	if p.n > 0 && !p.plain {
		p.buf = append(p.buf, ',')
	}
	p.n++
	p.buf = append(p.buf, item...)
	if p.plain {
		p.buf = append(p.buf, '\n')
	}
}

// send answers with the page as JSON.
func (p *page) send(c *call) error {
	p.buf = append(p.buf, `],"pagination":{"limit":`...)
	p.buf = strconv.AppendInt(p.buf, int64(p.limit), 10)
	p.buf = append(p.buf, `,"hasMore":`...)
	p.buf = strconv.AppendBool(p.buf, p.next != "")
	p.buf = append(p.buf, `,"nextCursor":`...)
	if p.next == "" {
		p.buf = append(p.buf, "null"...)
	} else {
		p.buf = append(append(append(p.buf, '"'), p.next...), '"')
	}
	p.buf = append(p.buf, "}}"...)
	return c.sendJSON(http.StatusOK, p.buf)
}

// walk adds to the page what lies in a bucket under space and prefix, behind the key after (nil:
// from the first), until the page is full. item makes an item of a record; nil is none.
func (p *page) walk(tx *bbolt.Tx, bucket, space, prefix, after []byte, kind byte, item func(k, v []byte) ([]byte, error)) error {
	prefix = append(bytes.Clone(space), prefix...)
	from := prefix
	if after != nil {
		after = append(bytes.Clone(space), after...)
		if bytes.Compare(after, from) > 0 {
			from = after
		}
	}
	cur := tx.Bucket(bucket).Cursor()
	k, v, err := seek(cur, bucket, from)
	if err != nil {
		return err
	}
	if after != nil && bytes.Equal(k, after) {
		k, v = cur.Next()
	}
	var last []byte
	for ; k != nil && bytes.HasPrefix(k, prefix); k, v = cur.Next() {
		it, err := item(k, v)
		if err != nil {
			return err
		}
		if it == nil {
			continue
		}
		if p.full() {
			p.next = cursorOf(kind, last)
			return nil
		}
		p.add(it)
		last = k[len(space):]
	}
	if k != nil { // it ends the list, unless its key was damaged
		_, err = unseal(bucket, k, v)
	}
	return err
}
