package main

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/swaggest/swgui/v5/static"
)

// openapiJSON is the OpenAPI document of the API. It is written by hand; the tests hold it against
// routes and against every answer that they get.
//
//go:embed openapi.json
var openapiJSON []byte

// swaggerPage is a page on which requests can be tried. It loads what stands in swaggerFiles and nothing
// else, from wherever it came itself.
const swaggerPage = `<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Confman API</title>
<link rel="stylesheet" href="/swagger/swagger-ui.css">
<link rel="icon" href="/swagger/favicon-32x32.png">
<div id="page"></div>
<script src="/swagger/swagger-ui-bundle.js"></script>
<script src="/swagger/page.js"></script>
`

// swaggerScript is not in the page, so that no script in a page need be allowed. A key that is entered
// stays in the memory of the page.
const swaggerScript = `SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#page", deepLinking: true,
  defaultModelsExpandDepth: -1, validatorUrl: null, queryConfigEnabled: false, persistAuthorization: false
});
`

// swaggerPolicy lets the page load and ask nothing but its own node. Swagger UI sets styles of elements,
// and has small images in its style sheet.
const swaggerPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " +
	"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// swaggerFiles are the files of Swagger UI that the page uses, with their types. The package has the
// larger ones compressed.
var swaggerFiles = map[string]string{
	"swagger-ui-bundle.js": "text/javascript; charset=utf-8",
	"swagger-ui.css":       "text/css; charset=utf-8",
	"favicon-32x32.png":    "image/png",
}

// openapi answers the document.
func (s *server) openapi(c *call) error {
	return c.sendFile("application/json", openapiJSON)
}

// swagger answers the page.
func (s *server) swagger(c *call) error {
	return c.sendFile("text/html; charset=utf-8", []byte(swaggerPage))
}

// swaggerFile answers a file that the page loads.
func (s *server) swaggerFile(c *call) error {
	name := c.r.PathValue("file")
	if name == "page.js" {
		return c.sendFile("text/javascript; charset=utf-8", []byte(swaggerScript))
	}
	media, ok := swaggerFiles[name]
	if !ok {
		return errNotFound.quoting("the page has no file %s", clip(name, 100))
	}
	if b, err := static.FS.ReadFile(name); err == nil {
		return c.sendFile(media, b)
	}
	b, err := static.FS.ReadFile(name + ".gz")
	if err != nil {
		return err
	}
	h := c.w.Header()
	h["Vary"] = []string{"Accept-Encoding"}
	if strings.Contains(strings.Join(c.r.Header["Accept-Encoding"], ","), "gzip") {
		h["Content-Encoding"] = []string{"gzip"}
		return c.sendFile(media, b)
	}
	zr, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return err
	}
	if b, err = io.ReadAll(zr); err != nil {
		return err
	}
	return c.sendFile(media, b)
}

// sendFile answers with b, which a browser must take for what media says.
func (c *call) sendFile(media string, b []byte) error {
	h := c.w.Header()
	h["Content-Type"] = []string{media}
	h["Content-Length"] = []string{strconv.Itoa(len(b))}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	h["Content-Security-Policy"] = []string{swaggerPolicy}
	c.w.WriteHeader(http.StatusOK)
	return c.write(b)
}
