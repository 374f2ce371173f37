//! The server, asked as programs ask it: over a socket.
#![cfg(all(feature = "serve", feature = "builtin-pair"))]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

struct Server {
    process: Child,
    address: String,
    stderr: Option<std::thread::JoinHandle<String>>,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_mtad"))
            .args(["serve", "--port", "0", "--device", "cpu"])
            .args(options)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the server says where it listens").unwrap();
            if let Some(address) = line.strip_prefix("listening on http://") {
                break address.to_owned();
            }
        };
        let rest = move || lines.map(|line| line.unwrap_or_default() + "\n").collect();
        Server { process, address, stderr: Some(std::thread::spawn(rest)) }
    }

    /// What is read until the server closes the connection: status, headers and body.
    fn raw(&self, request: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        // A server that refuses a large body may close before it has all of it.
        let _ = stream.write_all(request);
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("headers end");
        let headers = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
        let body = bytes[end + 4..].to_vec();
        let body = match headers.to_lowercase().contains("transfer-encoding: chunked") {
            true => joined(&body),
            false => body,
        };
        (status, headers, body)
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            self.address,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.raw(&request)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.ask("GET", path, "", b"");
        (status, String::from_utf8(body).unwrap())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let kind = "Content-Type: application/json\r\n";
        let (status, _, body) = self.ask("POST", path, kind, body.to_string().as_bytes());
        (status, serde_json::from_slice(&body).unwrap())
    }

    /// The events of a stream, which ends as it should.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let kind = "Content-Type: application/json\r\n";
        let (status, headers, body) = self.ask("POST", path, kind, body.to_string().as_bytes());
        assert_eq!(status, 200);
        assert!(headers.to_lowercase().contains("content-type: text/event-stream"), "{headers}");
        let text = String::from_utf8(body).unwrap();
        let mut events: Vec<&str> =
            text.split("\n\n").filter_map(|event| event.trim().strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// A figure of `/metrics`, summed over its labels.
    fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let values = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        values.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    fn wait_for(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < Duration::from_secs(30), "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal and gives the exit code, how long it took, and what was logged.
    #[cfg(unix)]
    fn end(mut self, signal: &str) -> (Option<i32>, Duration, String) {
        let id = self.process.id().to_string();
        let begun = Instant::now();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
        let code = self.process.wait().unwrap().code();
        (code, begun.elapsed(), self.stderr.take().unwrap().join().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The text of chunks.
fn joined(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let Some(end) = body.windows(2).position(|two| two == b"\r\n") else { return out };
        let size = std::str::from_utf8(&body[..end]).unwrap();
        let size = usize::from_str_radix(size.split(';').next().unwrap().trim(), 16).unwrap();
        if size == 0 {
            return out;
        }
        let rest = &body[end + 2..];
        out.extend_from_slice(&rest[..size.min(rest.len())]);
        body = rest.get(size + 2..).unwrap_or_default();
    }
}

fn text_of(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

#[test]
fn answers_have_their_shapes() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health"), (200, r#"{"status":"ok"}"#.to_owned()));
    let (_, models) = server.get("/v1/models");
    let models: Value = serde_json::from_str(&models).unwrap();
    let id = models["data"][0]["id"].as_str().unwrap();
    assert_eq!(models["data"][0]["mtad"]["chat"], false);
    assert_eq!(server.get(&format!("/v1/models/{id}")).0, 200);

    let asked = json!({
        "prompt": "Once upon a time", "max_tokens": 24, "seed": 7, "logprobs": 2, "echo": true,
        "strategy": "mtad", "tau": 0.3, "gamma": 3, "beam_width": 2,
    });
    let (status, answer) = server.post("/v1/completions", &asked);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["object"], "text_completion");
    let choice = &answer["choices"][0];
    assert!(text_of(&answer).starts_with("Once upon a time"), "{answer}");
    assert_eq!(choice["finish_reason"], "length");
    let log_probs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(log_probs.len(), 24);
    assert!(log_probs.iter().all(|p| p.as_f64().unwrap() <= 0.0));
    let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
    assert!(top.iter().all(|top| top.as_object().unwrap().len() <= 2));
    assert_eq!(choice["logprobs"]["text_offset"][0], "Once upon a time".len());
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 24);
    assert_eq!(usage["mtad"]["strategy"], "mtad");
    let (rounds, accepted) = (&usage["mtad"]["rounds"], &usage["mtad"]["accepted"]);
    let (rounds, accepted) = (rounds.as_u64().unwrap(), accepted.as_u64().unwrap());
    assert_eq!(usage["mtad"]["drafted"].as_u64().unwrap(), 3 * rounds);
    assert!(accepted <= 3 * rounds && rounds + accepted >= 24, "{usage}");

    // The same as a stream, and what the command line makes of it.
    let mut streamed = asked.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    streamed["mtad_tokens"] = true.into();
    let chunks = server.stream("/v1/completions", &streamed);
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, text_of(&answer));
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 24);
    let tokens: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["mtad"]["tokens"].as_array()).flatten().collect();
    assert_eq!(tokens.len(), 24);
    let drafted = tokens.iter().filter(|token| token["origin"] == "draft").count() as u64;
    assert!(drafted > 0 && drafted <= accepted, "{drafted} of {accepted}");
    for token in &tokens {
        assert_eq!(token["log_ratio"].is_null(), token["origin"] == "target", "{token}");
        assert!(token["log_ratio"].as_f64().is_none_or(|ratio| ratio > 0.3f64.ln()), "{token}");
    }
    let run = Command::new(env!("CARGO_BIN_EXE_mtad"))
        .args(["run", "Once upon a time", "--device", "cpu", "--max-tokens", "24", "--seed", "7"])
        .args(["--tau", "0.3", "--gamma", "3", "--beam-width", "2", "--json"])
        .output()
        .unwrap();
    let run: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(text_of(&answer), format!("Once upon a time{}", run["text"].as_str().unwrap()));

    let chat = json!({
        "messages": [{"role": "user", "content": "A dog ran home."}], "max_completion_tokens": 10,
        "temperature": 0, "logprobs": true, "top_logprobs": 3, "n": 2,
    });
    let (status, answer) = server.post("/v1/chat/completions", &chat);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    for (index, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(
            (&choice["index"], &choice["message"]["role"]),
            (&index.into(), &"assistant".into())
        );
        for entry in choice["logprobs"]["content"].as_array().unwrap() {
            // At temperature 0 the token is the most probable one.
            let top = entry["top_logprobs"].as_array().unwrap();
            assert_eq!((top.len(), &top[0]["token"]), (3, &entry["token"]), "{entry}");
            assert_eq!(top[0]["logprob"], entry["logprob"]);
            assert!(top.windows(2).all(|w| w[0]["logprob"].as_f64() >= w[1]["logprob"].as_f64()));
        }
    }
    // A prompt with two answers is one prompt.
    let (_, one) = server.post("/v1/chat/completions", &{
        let mut one = chat.clone();
        one["n"] = 1.into();
        one
    });
    assert_eq!(one["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    assert_eq!(one["choices"][0]["message"], answer["choices"][0]["message"]);

    let (_, tokenized) =
        server.post("/tokenize", &json!({"content": "A dog", "with_pieces": true}));
    let back = json!({"tokens": tokenized["tokens"]});
    assert_eq!(server.post("/detokenize", &back).1["content"], "A dog");
    assert_eq!(
        tokenized["pieces"].as_array().unwrap().len(),
        back["tokens"].as_array().unwrap().len()
    );

    let (status, page) = server.get("/");
    assert!(status == 200 && page.contains("<html"), "{page}");
    let (status, document) = server.get("/openapi.json");
    let document: Value = serde_json::from_str(&document).unwrap();
    assert!(status == 200 && document["paths"]["/v1/chat/completions"]["post"].is_object());
    assert!(server.metric("mtad_tokens_total") >= 24.0 * 2.0);
    assert!(server.metric("mtad_time_to_first_token_seconds_count") >= 4.0);
}

#[test]
fn bad_requests_get_their_status_and_a_sentence() {
    let server = Server::start(&["--body-limit", "1M", "--queue", "8"]);
    let table: Vec<Value> = serde_json::from_str(include_str!("serve/bad_requests.json")).unwrap();
    assert!(table.len() >= 60);
    for case in &table {
        let name = case["name"].as_str().unwrap();
        let body = match (&case["hex"], &case["nested"], &case["long"]) {
            (Value::String(hex), ..) => {
                let byte = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
                (0..hex.len()).step_by(2).map(byte).collect()
            }
            (_, Value::Number(depth), _) => {
                let depth = depth.as_u64().unwrap() as usize;
                format!("{{\"messages\":{}{}}}", "[".repeat(depth), "]".repeat(depth)).into_bytes()
            }
            (.., Value::Number(words)) => {
                let text = "one ".repeat(words.as_u64().unwrap() as usize);
                json!({"prompt": text}).to_string().into_bytes()
            }
            _ => case["body"].as_str().unwrap_or_default().as_bytes().to_vec(),
        };
        let mut headers = match case.get("type") {
            None => "Content-Type: application/json\r\n".to_owned(),
            Some(Value::Null) => String::new(),
            Some(kind) => format!("Content-Type: {}\r\n", kind.as_str().unwrap()),
        };
        let method = case["method"].as_str().unwrap_or("POST");
        let path = case["path"].as_str().unwrap();
        let (status, _, answer) = match case["host"].as_str() {
            Some(host) => {
                headers = format!(
                    "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                );
                server.raw(headers.as_bytes())
            }
            None => server.ask(method, path, &headers, &body),
        };
        let text = String::from_utf8(answer).unwrap();
        assert_eq!(u64::from(status), case["status"].as_u64().unwrap(), "{name}: {text}");
        let answer: Value =
            serde_json::from_str(&text).unwrap_or_else(|_| panic!("{name}: {text}"));
        let error = &answer["error"];
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(case["says"].as_str().unwrap()), "{name}: {message}");
        for member in ["param", "code"] {
            if let Some(wanted) = case.get(member) {
                assert_eq!(&error[member], wanted, "{name}: {error}");
            }
        }
        assert!(error["type"].is_string(), "{name}: {error}");
    }
    // Nothing of all that is left.
    assert_eq!(server.metric("mtad_running"), 0.0);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "A", "max_tokens": 2})).0, 200);
}

#[test]
fn what_is_no_http_ends_the_connection() {
    let server = Server::start(&[]);
    for garbage in
        [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], b"GET\r\n\r\n", b"\0\0\0\0\r\n\r\n"]
    {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(garbage).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    }
    assert_eq!(server.get("/health").0, 200);
}

/// Requests of all strategies but `auto`, half of them greedy.
fn requests() -> Vec<Value> {
    let strategies = [
        "greedy",
        "sample",
        "speculative",
        "mtad",
        "mmtad",
        "specinfer",
        "bild",
        "typical",
        "beam",
        "mtjd",
        "dsbd",
    ];
    let prompts = ["Once upon a time", "Tom and his dog", "The cat sat on", "It was raining."];
    let one = |i: usize| {
        json!({
            "prompt": prompts[i % prompts.len()].repeat(1 + i % 5),
            "strategy": strategies[i % strategies.len()],
            "temperature": if i.is_multiple_of(2) { 0.0 } else { 0.9 },
            "top_k": if i.is_multiple_of(3) { 40 } else { 0 },
            "seed": i,
            "max_tokens": 8 + 5 * (i % 7),
            "frequency_penalty": if i % 8 == 5 { 0.5 } else { 0.0 },
        })
    };
    (0..32).map(one).collect()
}

#[test]
fn a_text_is_the_same_alone_and_beside_others() {
    let server = Server::start(&["--parallel", "8"]);
    let requests = requests();
    let ask = |i: usize| {
        let (status, answer) = server.post("/v1/completions", &requests[i]);
        assert_eq!(status, 200, "{answer}");
        text_of(&answer).to_owned()
    };
    let alone: Vec<String> = (0..requests.len()).map(ask).collect();
    assert!(alone.iter().filter(|text| text.len() > 20).count() > 20, "{alone:?}");
    let passes = |server: &Server| {
        (server.metric("mtad_passes_total"), server.metric("mtad_pass_posts_total"))
    };
    let before = passes(&server);
    // In another order, eight at a time.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|i| (i * 7919) % 31);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let beside = std::sync::Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(&i) =
                    order.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    let text = ask(i);
                    beside.lock().unwrap().insert(i, text);
                }
            });
        }
    });
    for (i, text) in beside.into_inner().unwrap() {
        assert_eq!(text, alone[i], "{}", requests[i]);
    }
    let after = passes(&server);
    let (passes, posts) = (after.0 - before.0, after.1 - before.1);
    assert!(posts > 1.5 * passes, "{posts} posts in {passes} passes: nothing was shared");
}

#[test]
fn who_goes_away_frees_its_sequence() {
    let server = Server::start(&["--parallel", "1", "--queue", "1", "--ctx-size", "2048"]);
    let asked = json!({"prompt": "Once", "max_tokens": 2000, "stream": true, "strategy": "sample"});
    let open = || {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let body = asked.to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            server.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        stream
    };
    let mut first = open();
    first.read_exact(&mut [0; 100]).unwrap();
    assert_eq!(server.metric("mtad_running"), 1.0);
    // One waits, and no more.
    let second = open();
    server.wait_for("the second to wait", |server| server.metric("mtad_waiting") == 1.0);
    let body = json!({"prompt": "A", "max_tokens": 1}).to_string();
    let kind = "Content-Type: application/json\r\n";
    let (status, headers, answer) = server.ask("POST", "/v1/completions", kind, body.as_bytes());
    assert_eq!(status, 429, "{}", String::from_utf8_lossy(&answer));
    assert!(headers.to_lowercase().contains("retry-after: "), "{headers}");
    // Both go, and the sequence is free at once.
    drop((first, second));
    server.wait_for("the sequence", |server| server.metric("mtad_running") == 0.0);
    let answer = server.post("/v1/completions", &json!({"prompt": "A", "max_tokens": 3}));
    assert_eq!(answer.0, 200);
    assert_eq!(server.metric("mtad_requests_total{path=\"/v1/completions\",status=\"500\"}"), 0.0);
}

#[test]
#[cfg(unix)]
fn a_signal_lets_answers_end_or_cuts_them() {
    for signal in ["-TERM", "-INT"] {
        let server = Server::start(&["--parallel", "1", "--log", "info", "--log-json"]);
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let body = json!({
            "prompt": "My secret is", "max_tokens": 100000, "stream": true, "strategy": "sample"
        })
        .to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            server.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_exact(&mut [0; 100]).unwrap();
        let (code, took, log) = server.end(signal);
        assert_eq!(code, Some(0), "{log}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let rest = String::from_utf8_lossy(&rest).into_owned();
        // It ended, or says why not.
        assert!(rest.contains("data: [DONE]"), "{rest}");
        // The log has what happened, and no texts.
        assert!(!log.contains("secret"), "{log}");
        let lines = log.lines().filter(|line| line.starts_with('{'));
        lines.for_each(|line| drop(serde_json::from_str::<Value>(line).unwrap()));
    }
}

#[test]
fn keys_and_origins() {
    let keys = std::env::temp_dir().join(format!("mtad-keys-{}", std::process::id()));
    std::fs::write(&keys, "first-key\n\nsecond-key\n").unwrap();
    let options = ["--api-key-file", keys.to_str().unwrap(), "--cors-origin", "https://a.example"];
    let server = Server::start(&options);
    std::fs::remove_file(&keys).unwrap();
    let ask = |path: &str, headers: &str| server.ask("GET", path, headers, b"");
    assert_eq!(ask("/health", "").0, 200);
    assert_eq!(ask("/", "").0, 200);
    for path in ["/v1/models", "/metrics"] {
        for wrong in [
            "",
            "Authorization: Bearer wrong\r\n",
            "Authorization: Basic first-key\r\n",
            "Authorization: Bearer first-ke\r\n",
            "Authorization: Bearer \r\n",
        ] {
            let (status, headers, body) = ask(path, wrong);
            assert_eq!(status, 401, "{path} {wrong}");
            assert!(headers.to_lowercase().contains("www-authenticate: bearer"), "{headers}");
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["error"]["code"], "invalid_api_key");
        }
        for right in ["first-key", "second-key"] {
            assert_eq!(ask(path, &format!("Authorization: Bearer {right}\r\n")).0, 200);
        }
    }
    let allowed = |origin: &str| {
        let headers = format!(
            "Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\
             Access-Control-Request-Headers: content-type,authorization\r\n"
        );
        let (_, headers, _) = server.ask("OPTIONS", "/v1/completions", &headers, b"");
        headers.to_lowercase().contains(&format!("access-control-allow-origin: {origin}"))
    };
    assert!(allowed("https://a.example") && !allowed("https://b.example"));
    // Without the option nobody is.
    let plain = Server::start(&[]);
    let (_, headers, _) = plain.ask("GET", "/v1/models", "Origin: https://a.example\r\n", b"");
    assert!(!headers.to_lowercase().contains("access-control"), "{headers}");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let refused = |options: &[&str], says: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_mtad"))
            .args(["serve", "--device", "cpu"])
            .args(options)
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(says), "{options:?}: {error}");
    };
    refused(&["--host", "no.such.host.invalid"], "--host no.such.host.invalid");
    refused(&["--api-key", ""], "--api-key");
    refused(&["--api-key-file", "no-such-file"], "no-such-file");
    refused(&["--parallel", "0"], "--parallel");
    refused(&["--model", "no-such-model.gguf"], "no-such-model.gguf");
    refused(&["--template", "no-such-template"], "no-such-template");
    refused(&["--tau", "-1"], "tau");
    refused(&["--memory", "1M"], "not enough memory");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    refused(&["--port", &port], &format!("127.0.0.1:{port}"));
}

#[test]
fn what_was_evaluated_once_is_known() {
    let text = "Once upon a time there was a little dog who lived in a big house. ".repeat(6);
    let ask = |server: &Server, prompt: &str, strategy: &str| {
        let body = json!({
            "prompt": prompt, "strategy": strategy, "max_tokens": 20, "seed": 3, "temperature": 0.8,
        });
        let (status, answer) = server.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        let known = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        let all = answer["usage"]["prompt_tokens"].as_u64().unwrap();
        (text_of(&answer).to_owned(), known, all)
    };
    // Whichever sequence answers, it begins with what another has evaluated.
    let server = Server::start(&["--parallel", "3"]);
    let forgetful = Server::start(&["--parallel", "3", "--prefix-memory", "0"]);
    for (i, strategy) in ["greedy", "mtad", "speculative", "mmtad", "sample"].iter().enumerate() {
        let (first, known, _) = ask(&server, &text, strategy);
        assert_eq!(known == 0, i == 0, "{known}");
        let (again, known, all) = ask(&server, &text, strategy);
        assert!(known >= all - 2, "{known} of {all}");
        // A conversation goes on with the answer.
        let longer = format!("{text}{first} And then");
        let (next, known, all) = ask(&server, &longer, strategy);
        assert!(known + 8 > all, "{known} of {all}");
        assert_eq!(again, first);
        // The same as where nothing is kept.
        assert_eq!(ask(&forgetful, &text, strategy).0, first);
        assert_eq!(ask(&forgetful, &longer, strategy).0, next);
    }
}

#[test]
fn texts_have_the_form_that_was_asked_for() {
    let server = Server::start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {
            "animal": {"enum": ["dog", "cat", "bird"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 20},
            "friends": {"type": "array", "items": {"enum": ["Tom", "Lily"]}, "maxItems": 2},
        },
        "required": ["animal", "age", "friends"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}});
    for strategy in
        ["greedy", "sample", "speculative", "mtad", "mmtad", "specinfer", "beam", "dsbd"]
    {
        let mut body = json!({
            "prompt": "Lily had a pet:", "strategy": strategy, "seed": 5, "max_tokens": 200,
            "response_format": format, "mtad_tokens": true,
        });
        let (status, answer) = server.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        let pet: Value =
            serde_json::from_str(text_of(&answer)).unwrap_or_else(|_| panic!("{answer}"));
        assert!(["dog", "cat", "bird"].contains(&pet["animal"].as_str().unwrap()), "{pet}");
        assert!(
            pet["age"].as_u64().unwrap() <= 20 && pet["friends"].as_array().unwrap().len() <= 2
        );
        assert_eq!(
            (pet.as_object().unwrap().len(), &answer["choices"][0]["finish_reason"]),
            (3, &"stop".into())
        );
        // The same as a stream.
        body["stream"] = true.into();
        let chunks = server.stream("/v1/completions", &body);
        let text: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, text_of(&answer), "{strategy}");
    }

    let any = json!({"prompt": "A list:", "response_format": {"type": "json_object"}, "max_tokens": 300, "seed": 2});
    let (_, answer) = server.post("/v1/completions", &any);
    if answer["choices"][0]["finish_reason"] == "stop" {
        assert!(serde_json::from_str::<Value>(text_of(&answer)).unwrap().is_object(), "{answer}");
    }
    for grammar in ["root ::= \"!\" (\"yes\" | \"no\")", "start: \"!\" (\"yes\" | \"no\")"] {
        let body = json!({
            "prompt": "Is it so?", "grammar": grammar, "max_tokens": 20, "mtad_tokens": true,
        });
        let (status, answer) = server.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        assert!(["!yes", "!no"].contains(&text_of(&answer)), "{answer}");
        // What alone can follow comes without a pass.
        let first = &answer["mtad"]["tokens"][0];
        assert_eq!((&first["text"], &first["origin"]), (&"!".into(), &"forced".into()), "{answer}");
        assert_eq!(
            (&first["log_ratio"], &first["log_prob"]),
            (&Value::Null, &Value::Null),
            "{answer}"
        );
    }

    let tool = |name: &str| {
        json!({"type": "function", "function": {
            "name": name, "parameters": {
                "type": "object", "properties": {"place": {"enum": ["park", "house"]}},
                "required": ["place"], "additionalProperties": false,
            },
        }})
    };
    let ask = |choice: Value, stream: bool| {
        json!({
            "messages": [{"role": "user", "content": "Where is the dog?"}], "max_tokens": 200, "seed": 1,
            "tools": [tool("find"), tool("call")], "tool_choice": choice, "stream": stream,
        })
    };
    let named = json!({"type": "function", "function": {"name": "call"}});
    for (choice, names) in [(json!("required"), &["find", "call"][..]), (named, &["call"])] {
        let (status, answer) = server.post("/v1/chat/completions", &ask(choice.clone(), false));
        assert_eq!(status, 200, "{answer}");
        let choice_made = &answer["choices"][0];
        assert_eq!(choice_made["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(choice_made["message"]["content"], Value::Null);
        let function = &choice_made["message"]["tool_calls"][0]["function"];
        assert!(names.contains(&function["name"].as_str().unwrap()), "{answer}");
        let arguments: Value =
            serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        assert!(["park", "house"].contains(&arguments["place"].as_str().unwrap()));
        let chunks = server.stream("/v1/chat/completions", &ask(choice, true));
        let calls: Vec<_> = chunks
            .iter()
            .filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array())
            .collect();
        assert_eq!((calls.len(), &calls[0][0]["function"]), (1, function), "{chunks:?}");
        assert_eq!(calls[0][0]["index"], 0);
    }
}
